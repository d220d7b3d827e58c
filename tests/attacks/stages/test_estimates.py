"""Interactions to first order: as read where one of two parts is nearly another, for parts of several tokens too."""

import copy

import pytest
import torch

from attacks.scoring.budget import Budget
from attacks.scoring.problem import Problem
from attacks.scoring.reading import Reading
from attacks.stages.phrases.estimates import lengths, lengths_flops
from tests.attacks.words import TEXTS, seeded, spend
from vectors.operations import count_operations, executed

BEFORES, AFTERS = [(50,), (51,), (52,)], [(60, 61), (62, 63), (64, 65)]


@pytest.fixture
def near(model):
    """Tokens 51 and 52 differ little from token 50."""
    changed = copy.deepcopy(model)
    weight = changed.get_input_embeddings().weight
    with torch.no_grad():
        weight[51:53] = weight[50] + 0.01 * torch.randn(2, weight.shape[1], generator=seeded())
    return changed


@pytest.mark.parametrize("size", [1, 2])
def test_near_a_part_the_estimate_is_what_is_read(near, tokenizer, size):
    problem, layer = Problem.from_chat(near, tokenizer, TEXTS[:1], 3), 2
    directions = torch.randn(32, 5, generator=seeded(1))
    root = Reading.of([near], problem.before[0], layer)
    befores = [(70,) * (size - 1) + part for part in BEFORES]
    found = lengths(root, befores, AFTERS, befores[:1], layer, directions, Budget())
    read = torch.stack([
        torch.stack([root.ends([(*before, *after)], [layer])[0][layer][0] @ directions for after in AFTERS])
        for before in befores
    ])  # fmt: skip
    read = read - read.mean(0) - read.mean(1, keepdim=True) + read.mean((0, 1))
    assert float(found.max()) > 1e-4
    torch.testing.assert_close(found, read.norm(dim=-1), rtol=0.1, atol=0.02 * float(found.max()))


def test_gradients_are_a_mean_over_the_parts_in_the_place_of_the_first(near, tokenizer):
    """A mean over twice the same is that one; over two others it is neither."""
    problem = Problem.from_chat(near, tokenizer, TEXTS[:1], 3)
    root, directions = Reading.of([near], problem.before[0], 1), torch.randn(32, 3, generator=seeded(1))
    places = [(80,)], [(80,)] * 2, [(90,)], [(80,), (90,)]
    one, same, other, both = (lengths(root, BEFORES, AFTERS, some, 1, directions, Budget()) for some in places)
    torch.testing.assert_close(one, same)
    assert not torch.allclose(one, other, rtol=0.01) and not torch.allclose(one, both, rtol=0.01)


def test_operations_are_counted_as_reckoned(near, tokenizer):
    count_operations(near)
    problem = Problem.from_chat(near, tokenizer, TEXTS[:1], 3)
    root = Reading.of([near], problem.before[0], 2)
    began = executed()
    lengths(root, BEFORES, AFTERS, [(80,), (90,)], 2, torch.randn(32, 5, generator=seeded(1)), Budget())
    expected = lengths_flops(root, (3, 3), (1, 2), 2, 2, 5)
    assert executed() - began == pytest.approx(expected, rel=0.15)


def test_nothing_is_estimated_once_the_budget_is_spent(near, tokenizer):
    root = Reading.of([near], Problem.from_chat(near, tokenizer, TEXTS[:1], 3).before[0], 1)
    budget = Budget(flops=1.0)
    spend(2.0)
    found = lengths(root, BEFORES, AFTERS, BEFORES[:1], 1, torch.randn(32, 5, generator=seeded(1)), budget)
    assert found.shape == (3, 3) and not found.any()


def test_a_model_that_keeps_something_else_is_named(near, tokenizer):
    root = Reading.of([near], Problem.from_chat(near, tokenizer, TEXTS[:1], 3).before[0], 1)
    other = Reading(root.models, (root.prefixes[0].uncached,))
    with pytest.raises(ValueError, match="keeps no keys and values"):
        lengths(other, BEFORES, AFTERS, BEFORES[:1], 1, torch.randn(32, 5, generator=seeded(1)), Budget())
