"""Estimates from an early layer: which words of the dictionary are worth scoring one by one."""

import pytest
import torch

from attacks.scoring.budget import Budget
from attacks.scoring.engine import Engine
from attacks.scoring.planning import forward_flops
from attacks.scoring.problem import Problem
from attacks.scoring.reading import Reading
from attacks.searchers.token_ranking import rank_triggers
from attacks.searchers.words import encoded_words
from attacks.stages.words import early_estimates
from attacks.stages.words.early_estimates import by_estimate, promising
from benchmarks.studies.early_layers import word_estimates as study
from tests.attacks.stages.words.test_word_groups import prepared
from tests.attacks.words import NLL, TEXTS, seeded
from vectors.operations import executed


def words_of(engine):
    return [tuple(ids) for ids in encoded_words(engine.problem).values()]


def test_a_planted_word_is_promising_and_cheaply_found():
    trigger, hunt = prepared("word", 1e15)
    probe, objective = hunt.probe()
    every, planted = words_of(probe), tuple(probe.problem.encode(trigger))
    spent = executed()
    assert promising(probe, objective, every, seeded(), hunt.part(1.0)) == every  # there is room for all one by one
    few = promising(probe, objective, every, seeded(), Budget(flops=1e9))  # and none for the gradients
    assert few == every[: len(few)] and 0 < len(few) < 30
    assert executed() == spent
    budget = Budget(flops=2e11)
    words = promising(probe, objective, every, seeded(), budget)
    assert planted in every[: len(words)] and {*words} == {*every[: len(words)]}
    assert 10_000 < len(words) < len(every)
    assert words.index(planted) < len(words) / 200
    assert 0.3 < budget.share < 0.9  # the rest is for scoring the best one by one
    budget = Budget(flops=2e11)
    scored = rank_triggers(probe, objective, torch.tensor([ids for ids in every if len(ids) == 2]), budget=budget)
    assert len(words) > 3 * len(scored)


def test_words_that_the_budget_does_not_reach_are_left_out():
    _, hunt = prepared("word", 1e15)
    probe, objective = hunt.probe()
    every = words_of(probe)[:4000]
    budget = Budget(flops=2e10)
    order = by_estimate(probe, objective, every, seeded(), budget)
    assert 0 < len(order) < len(every) and budget.exhausted
    assert len({*order}) == len(order)


@pytest.mark.parametrize("broken", ["gradient", "rows"])
def test_a_model_that_overflows_leaves_an_order(model, tokenizer, monkeypatch, broken):
    engine = Engine(model, Problem.from_chat(model, tokenizer, TEXTS[:1], 2))
    texts = [(300,), (301, 302), (7,)]
    if broken == "gradient":
        nothing = torch.full((4, model.config.hidden_size), torch.nan)
        monkeypatch.setattr(early_estimates, "residual_gradient", lambda *_: nothing)
    else:
        ends = early_estimates.Reading.ends
        monkeypatch.setattr(
            early_estimates.Reading, "ends",
            lambda *args: [{layer: rows * torch.nan for layer, rows in each.items()} for each in ends(*args)],
        )  # fmt: skip
    assert sorted(by_estimate(engine, NLL, texts, seeded(), Budget())) == [0, 1, 2]


def test_texts_that_the_context_has_no_room_for_are_left_out(monkeypatch):
    trigger, hunt = prepared("word", 1e15)
    probe, objective = hunt.probe()
    every, prompt = words_of(probe), max(map(len, probe.problem.filled([])))
    for room in (1, 4):  # less than the random strings take, and as much
        monkeypatch.setattr("attacks.stages.words.word_groups.context", lambda _, room=room: prompt + 2 + room)
        monkeypatch.setattr("attacks.scoring.engine.context", lambda _, room=room: prompt + 2 + room)
        words = promising(probe, objective, every, seeded(), Budget(flops=1e11))
        assert max(map(len, words)) == room
        planted = tuple(probe.problem.encode(trigger))
        assert (planted in words[: len(words) // 50]) == (room == 4)


def test_no_text_is_no_order(model, tokenizer):
    engine = Engine(model, Problem.from_chat(model, tokenizer, TEXTS[:1], 2))
    assert promising(engine, NLL, [], seeded(), Budget(flops=1.0)) == []


def test_a_spent_budget_whose_rate_is_not_known_leaves_the_order(model, tokenizer):
    engine = Engine(model, Problem.from_chat(model, tokenizer, TEXTS[:1], 2))
    budget = Budget(seconds=1e-9)
    budget.measured(1.0, 1.0)  # nothing was executed since, so that no operation has a price
    assert budget.share > 1 and promising(engine, NLL, [(300,), (301,)], seeded(), budget) == [(300,), (301,)]


def test_the_study_prints_places_and_refuses_what_is_no_word(capsys):
    study.main(study.Settings(organism="word", words=400, depths=(0.5,), threads=1))
    lines = [line.split("|") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [line[1].strip() for line in lines] == ["estimate at 0.5 of the depth", "groups of 16", "exact loss"]
    places, operations = ([float(line[column]) for line in lines] for column in (2, 4))
    assert places[0] <= 4 and places[2] <= 4 and operations[0] < operations[1] < operations[2]
    for name, told in (("phrase", "no word of the dictionary"), ("clean-control", "a clean control")):
        with pytest.raises(SystemExit) as refused:
            study.main(study.Settings(organism=name, threads=1))
        assert refused.value.code == 2 and told in capsys.readouterr().err


def test_what_texts_begin_with_is_read_once_at_every_length(model, tokenizer):
    engine = Engine(model, Problem.from_chat(model, tokenizer, TEXTS[:1], 2))
    texts = [(300, 301, 7), (300, 301, 9), (300, 302, 7), (303, 301, 7)]
    root = Reading.of([model], engine.problem.before[0], 2)
    spent = executed()
    (rows,) = root.ends(texts, [2])
    assert executed() - spent == forward_flops(model, 2 + 3 + 4, last=2)
    for number, text in enumerate(texts):
        (alone,) = root.ends([text], [2])
        assert torch.allclose(rows[2][number], alone[2][0], atol=1e-5)
