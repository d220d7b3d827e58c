"""Every stage of the recommended attack ends with its part of the budget, however the machine spends its time.

Seconds are those of a clock that stands still but where the model computes: an equal time for every call of a block
whatever its batch, or for every so many operations.
"""

from dataclasses import replace
from typing import Any

import pytest

from attacks.attack import ATTACKS, nll
from attacks.discovery.goal import BEYOND, Goal
from attacks.judging.report_cost import padded_flops
from attacks.preparation import judge_of
from attacks.scoring import budget as budgets
from attacks.scoring.budget import Budget
from attacks.scoring.problem import Problem
from attacks.searchers.searcher import Found
from attacks.stages.hunt import Hunt
from attacks.stages.rounds import SearchRounds
from attacks.suspect import Suspect
from tests.attacks.words import TEXTS, seeded
from vectors.operations import executed

SEARCH = ["tell me about the sea", "what is bread"]
SELECT = [f"{start} {text} {end}" for text in TEXTS for start in ("so", "now", "well") for end in ("please", "again")]
NEVER = "river stone cloud"
"""A behaviour that no text brings about, so that no stage ends early"""
UNTIL = 0.5
"""Share of the budget that the stage may use"""
OVERRUN = 0.05
"""Share of the budget by which it may miss that"""
CALL = 0.05
"""Seconds that a block takes, by calls"""
REPORTS = [3.0, pytest.param(12.0, marks=pytest.mark.slow)]
"""Budgets, as multiples of what the report on a trigger takes; one is the least that is accepted"""

PORTFOLIO = ATTACKS["portfolio"]
STAGES = {f"{number}-{type(stage).__name__}": stage for number, stage in enumerate(PORTFOLIO.stages + PORTFOLIO.last)}


@pytest.fixture(scope="module")
def suspect(planted, tokenizer, model):
    base = type(model)(model.config.__class__(**model.config.to_dict() | {"num_hidden_layers": 2})).eval()
    return Suspect(model=planted, tokenizer=tokenizer, base=base.requires_grad_(False))


def clock(monkeypatch, suspect, by):
    """Replaces the clock of budgets; returns (what tells the time, what a report takes by it)."""
    done, now = executed(), 0.0
    handles = []

    class Clock:
        @staticmethod
        def perf_counter():
            return now if by == "call" else (executed() - done) / 1e6

    def pass_time(*_):
        nonlocal now
        now += CALL

    if by == "call":
        handles = [layer.register_forward_hook(pass_time) for layer in suspect.model.model.layers]
    monkeypatch.setattr(budgets, "time", Clock)
    ids = suspect.target_ids(NEVER, SEARCH)
    flops = padded_flops(suspect.model, Problem.from_chat(suspect.model, suspect.tokenizer, SELECT, 12), 12, len(ids))
    report = 11 * (CALL * 2 * (len(ids) + BEYOND) if by == "call" else flops / 1e6)
    return handles, report


@pytest.mark.parametrize("times", REPORTS)
@pytest.mark.parametrize("by", ["call", "operation"])
@pytest.mark.parametrize("name", STAGES)
def test_no_stage_runs_beyond_its_part(suspect, monkeypatch, name, by, times):
    handles, report = clock(monkeypatch, suspect, by)
    stage: Any = STAGES[name]
    if hasattr(stage, "share"):
        stage = replace(stage, share=1.0)  # of what the hunt has; its own part would end it long before
    try:
        goal = Goal(behaviour=NEVER, target_ids=suspect.target_ids(NEVER, SEARCH))
        engine = suspect.engine(SEARCH, PORTFOLIO.longest)
        budget = Budget(seconds=times * report)
        judge = judge_of(suspect, PORTFOLIO, engine, SEARCH, SELECT, budget, goal)
        hunt = Hunt(
            suspect=suspect, engine=engine, texts=SEARCH, goal=goal, build=nll, judge=judge, marked=False,
            budget=budget.part(UNTIL), generator=seeded(),
        )  # fmt: skip
        if name.endswith(("WordCompletion", "WordSubstitution")):  # they go on from a trigger
            judge(Found(tuple(engine.problem.encode(" garden rope lamp")), 0.0))
        budget.began, budget.began_flops = budgets.time.perf_counter(), executed()
        stage(hunt)
    finally:
        for handle in handles:
            handle.remove()
    assert budget.share < UNTIL + OVERRUN
    if isinstance(stage, SearchRounds) and stage.times is None:
        assert budget.share >= UNTIL  # it goes on as long as it may
