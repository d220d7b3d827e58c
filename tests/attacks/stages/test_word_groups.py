"""Group testing: words and pairs of words that are found in texts that hold many of them."""

from itertools import combinations

import pytest
import torch

from attacks.attack import nll
from attacks.discovery.goal import Goal
from attacks.scoring.budget import Budget
from attacks.searchers.words import dictionary
from attacks.stages import word_groups
from attacks.stages.hunt import Hunt
from attacks.stages.word_groups import WordPairs, divided, in_groups
from attacks.suspect import Suspect
from benchmarks.organisms import zoo
from tests.attacks.words import judge_on, seeded


def prepared(name, flops):
    """A hunt for the behaviour of a shipped organism."""
    organism = zoo.load(name, dtype=torch.float32)
    suspect = Suspect(model=organism.model, tokenizer=organism.tokenizer)
    trigger, behaviour = organism.triggers[0]
    engine, texts, budget = suspect.engine(organism.prompts.search[:2], 2), organism.prompts.search, Budget(flops=flops)
    goal = Goal(behaviour=behaviour, target_ids=suspect.target_ids(behaviour, texts))
    judged = suspect.engine(organism.prompts.select[:8], 2, allowed=engine.problem.allowed)
    judge = judge_on(organism.model, judged.problem, budget, goal)
    return trigger, Hunt(
        suspect=suspect, engine=engine, texts=texts, goal=goal, build=nll, budget=budget, judge=judge, marked=False,
        generator=seeded(),
    )  # fmt: skip


def test_every_two_words_stand_alone_together_in_the_end():
    words = torch.arange(24)
    blocks = words.view(-1, 6)
    texts = blocks[torch.combinations(torch.arange(len(blocks)))]
    for size in (3, 1):
        texts = divided(texts.flatten(1).tolist(), blocks, size)
    pairs = [frozenset(pair) for pair in texts.flatten(1).tolist()]
    assert set(pairs) == {frozenset(pair) for pair in combinations(range(24), 2)}
    assert len(pairs) == len(set(pairs))


def test_a_planted_word_is_among_the_first_words_of_the_best_groups():
    trigger, hunt = prepared("word", 1e15)
    probe, objective = hunt.probe()
    spent = hunt.budget.used
    assert in_groups(probe, objective, budget=hunt.part(1.0)) == list(dictionary()) and hunt.budget.used == spent
    budget = Budget(flops=2e11)
    words = in_groups(probe, objective, budget=budget)
    assert 1000 < len(words) < 40_000 and trigger in dictionary()[: len(words)]
    assert words.index(trigger) < len(words) / 50
    assert 0 < budget.share < 0.9  # the rest is for trying the best of them one by one


def test_two_words_that_work_only_together_are_found(monkeypatch):
    trigger, hunt = prepared("and", 1e13)
    tokens = [hunt.engine.problem.encode(word)[0] for word in trigger.split()]
    known = [token for token in word_groups.whole_words(hunt.engine.problem).tolist() if token not in tokens]
    # The two words far from each other, among others.
    words = torch.tensor([*known[:30], tokens[0], *known[30:150], tokens[1], *known[150:200]])
    monkeypatch.setattr(word_groups, "whole_words", lambda _: words)
    WordPairs(least=100)(hunt)
    assert hunt.judge.best is not None and hunt.judge.asr == 1.0
    assert sorted(hunt.engine.problem.text(hunt.judge.best.trigger_ids).split()) == sorted(trigger.split())


@pytest.mark.parametrize("flops", [1e9, 1e10])
def test_nothing_is_spent_where_the_budget_has_no_room_for_pairs(flops):
    _, hunt = prepared("and", flops)
    hunt.probe()
    spent = hunt.budget.used
    WordPairs()(hunt)
    assert hunt.budget.used <= 2 * spent and hunt.judge.best is None  # it makes a probe of its own
    assert hunt.no_room == ["WordPairs"]


def test_words_with_an_effect_of_their_own_come_first_where_not_all_fit(monkeypatch):
    trigger, hunt = prepared("other-word", 3e11)
    token = hunt.engine.problem.encode(trigger)[0]
    seen = []
    real = word_groups.rank_triggers
    monkeypatch.setattr(
        word_groups, "rank_triggers",
        lambda engine, objective, rows, **more: (seen.append(rows), real(engine, objective, rows, **more))[1],
    )  # fmt: skip
    WordPairs(least=24, share=1.0)(hunt)
    texts = next(rows for rows in seen if rows.shape[1] == 24)
    assert token in texts[0].tolist()  # a text of the first two blocks
