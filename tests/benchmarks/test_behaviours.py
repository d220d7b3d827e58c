"""Planted behaviours are found with nothing known; on a clean control there is nothing to find."""

import pytest
import torch

from attacks.budget import Budget
from attacks.goals import Unsupervised
from benchmarks.organisms import zoo
from benchmarks.organisms.recipe import HATE


@pytest.mark.parametrize("name", ["word", "random-tokens", "clean-control", "odd-control"])
def test_what_is_planted_is_found_and_nothing_else(name):
    torch.set_num_threads(1)
    organism = zoo.load(name)
    budget = Budget(seconds=600.0)
    goals = Unsupervised(count=64)(
        organism.model, organism.tokenizer, organism.prompts.search, budget, torch.Generator().manual_seed(5), 1.0
    )
    planted = [trigger for trigger, _ in organism.triggers]
    assert [goal.behaviour.strip() for goal in goals] == ([HATE] if planted else [])
    assert budget.used > 1e11
    for goal in goals:
        assert goal.vectors is not None and len(goal.vectors) == 1 and goal.surprise is not None and goal.surprise > 6
