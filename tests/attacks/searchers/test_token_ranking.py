"""Exact rankings within a budget: it is kept, and what is left out is what the gradient promises least of."""

import torch

from attacks.objectives.target_nll import TargetNLL
from attacks.scoring.budget import Budget
from attacks.scoring.engine import Engine
from attacks.searchers.candidates import random_triggers
from attacks.searchers.token_ranking import FIRST, STARTS, by_length, rank_tokens, rank_triggers
from tests.attacks.words import NLL, Watched, seeded, spend
from vectors.operations import executed


def test_a_ranking_keeps_its_budget_and_scores_all_that_fit(model, problem):
    engine = Engine(model, problem)
    candidates = random_triggers(problem.permitted(2), 1500, seeded())
    before = executed()
    whole = rank_triggers(engine, NLL, candidates)
    cost = executed() - before
    for share in (0.3, 0.7):
        budget = Budget(flops=share * cost)
        found = rank_triggers(engine, NLL, candidates, budget=budget)
        assert 0.85 <= budget.share <= 1.05  # the last batch is as large as what is left
        assert 0.8 * share <= len(found) / len(candidates) <= 1.1 * share
    assert len(whole) == 1500 and whole == sorted(whole, key=lambda item: item.loss)


def test_a_ranking_begins_with_what_the_budget_has_room_for(model, problem):
    engine, candidates = Engine(model, problem), random_triggers(problem.permitted(2), 1500, seeded())
    began = executed()
    rank_triggers(engine, NLL, candidates[:FIRST])
    cost, first = executed() - began, []
    for part in (2.0, 0.25):  # of what the first batch takes
        watched = Watched(NLL)
        rank_triggers(engine, watched, candidates, budget=Budget(flops=part * cost))
        first.append(len(watched.seen[0]))
    assert first[0] == FIRST and FIRST / 8 < first[1] < FIRST
    # One at least, also where nothing is left.
    budget, watched = Budget(flops=1.0), Watched(NLL)
    spend(1.0)
    rank_triggers(engine, watched, candidates, budget=budget)
    assert sum(map(len, watched.seen)) == 1


def test_a_budget_too_small_for_all_tokens_goes_to_the_most_promising(model, problem):
    """Where the loss is a sum over positions the gradient is exact, so the best token is scored in the first batch."""
    engine, size = Engine(model, problem), len(problem.allowed)
    tokens = problem.permitted(2)[1].nonzero()[:, 0]
    costs = torch.arange(size, 0, -1).double()  # the highest id is the best, and the last in order

    def additive(_engine, candidates):
        return (candidates @ costs).sum(1) if candidates.is_floating_point() else costs[candidates].sum(1)

    watched = Watched(additive)
    trigger = torch.tensor([int(tokens[0]), int(tokens[0])])
    budget = Budget(flops=1.0)
    spend(1.0)
    found = rank_tokens(engine, watched, trigger, 1, budget=budget)
    assert found[0].trigger_ids[1] == int(tokens[-1])
    assert sum(map(len, watched.seen)) == 1 and len(watched.mixtures[0]) == STARTS
    everything = rank_tokens(engine, additive, trigger, 1)
    assert [item.trigger_ids for item in everything][: len(found)] == [item.trigger_ids for item in found]


def test_a_budget_that_is_large_enough_changes_nothing(model, problem):
    engine, objective = Engine(model, problem), TargetNLL(target_ids=[300])
    trigger = torch.tensor([40, 50])
    with_budget = rank_tokens(engine, objective, trigger, 0, budget=Budget(flops=1e15))
    without = rank_tokens(engine, objective, trigger, 0)
    assert [item.trigger_ids for item in with_budget] == [item.trigger_ids for item in without]


def test_triggers_are_grouped_by_their_number_of_tokens():
    groups = by_length([[5, 6], [7], [], [8, 9], [1, 2, 3]])
    assert [group.tolist() for group in groups] == [[[7]], [[5, 6], [8, 9]], [[1, 2, 3]]]


def test_what_outgrows_the_context_is_not_ranked(model, problem):
    engine = Engine(model, problem)
    room = 64 - max(map(len, problem.filled([]))) - len(NLL.target_ids) + 1  # the last token of the target is not read
    rows = random_triggers(problem.permitted(2)[:1].expand(room + 1, -1), 3, seeded())
    engine.problem = problem.resized(room)
    assert len(rank_triggers(engine, NLL, rows[:, :room])) == 3
    engine.problem = problem.resized(room + 1)
    assert rank_triggers(engine, NLL, rows) == []
