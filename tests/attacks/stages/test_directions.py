"""Directions that the likelihood of a behaviour depends on: gradients as by finite differences, the search's texts."""

import pytest
import torch

from attacks.objectives.target_nll import TargetNLL
from attacks.scoring.budget import Budget
from attacks.scoring.engine import Engine
from attacks.scoring.problem import Problem
from attacks.searchers.hotflip import HotFlip
from attacks.stages.phrases import directions as module
from attacks.stages.phrases.directions import directions, directions_flops
from tests.attacks.words import TEXTS, seeded
from vectors.residual import decoder

TARGET = (40, 41, 42)


@pytest.fixture
def engine(model, tokenizer):
    return Engine(model, Problem.from_chat(model, tokenizer, TEXTS[:2], 3))


def test_a_change_counts_as_the_likelihood_changes(model, engine):
    """Along a direction of one text's gradient the loss changes as the gradient says, and nowhere else in the text."""
    one, text, layer = Engine(model, engine.problem.take([0]).resized(4)), (50, 60, 70, 80), 1
    second = module._second_moment(one, TARGET, layer, [text])
    assert second.trace() == pytest.approx(1.0, abs=1e-5)  # four gradients of unit length
    objective, ids = TargetNLL(target_ids=TARGET), torch.tensor([text])
    behind = len(one.problem.after[0]) + len(TARGET) - 1

    def moved(position, step):
        def add(_module, _args, output):
            hidden = (output if isinstance(output, torch.Tensor) else output[0]).clone()
            hidden[:, hidden.shape[1] - behind - 4 + position] += step
            return hidden if isinstance(output, torch.Tensor) else (hidden, *output[1:])

        handle = decoder(model).layers[layer - 1].register_forward_hook(add)
        try:
            return float(one.losses(objective, ids))
        finally:
            handle.remove()

    basis, size = torch.eye(second.shape[0]), 1e-2
    slopes = torch.tensor([
        [(moved(position, size * row) - moved(position, -size * row)) / (2 * size) for row in basis]
        for position in range(4)
    ])  # fmt: skip
    slopes = torch.nn.functional.normalize(slopes, dim=-1)
    torch.testing.assert_close(second, slopes.T @ slopes / 4, atol=2e-2, rtol=0.05)


def test_lengths_are_what_the_second_moments_say(engine, monkeypatch):
    seen = []

    def moment(_, target, layer, texts):
        seen.append((target, layer, texts))
        return torch.diag(torch.arange(32.0)) * (1.0 if len(seen) == 1 else 2.0)

    monkeypatch.setattr(module, "_second_moment", moment)
    mapped = directions(engine, TARGET, 2, seeded(), Budget(flops=1e12))
    change = torch.randn(32, generator=seeded(1))
    assert (change @ mapped).square().sum() == pytest.approx(
        float(3 * (torch.arange(32.0) * change**2).sum()), rel=1e-4
    )
    (target, layer, strings), (_, _, near) = seen
    assert target == TARGET and layer == 2 and len(strings) == module.STRINGS and 0 < len(near) <= module.SEARCHES
    losses = [engine_losses(engine, texts).mean() for texts in (strings, near)]
    assert losses[1] < losses[0] - 0.2  # what the searches found elicits the target more than random strings do


def engine_losses(engine, texts):
    return Engine(engine.model, engine.problem.resized(module.TOKENS)).losses(
        TargetNLL(target_ids=TARGET), torch.tensor(texts)
    )


def test_its_cost_is_foreseen(engine):
    budget = Budget(flops=1e12).started()
    directions(engine, TARGET, 2, seeded(), budget)
    assert 0.3 < budget.used / directions_flops(engine.model, engine.problem) < 3


def test_nothing_found_leaves_random_strings(engine, monkeypatch):
    monkeypatch.setattr(HotFlip, "__call__", lambda *_: [])
    assert directions(engine, TARGET, 2, seeded(), Budget(flops=1e12)).isfinite().all()


def test_fewer_tokens_than_a_search_tries_at_once_are_enough(model, tokenizer):
    allowed = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    allowed[50:60] = True
    few = Engine(model, Problem.from_chat(model, tokenizer, TEXTS[:2], 3, allowed=allowed))
    assert directions(few, TARGET, 2, seeded(), Budget(flops=1e12)).isfinite().all()
