"""The gradient of an objective by the residual stream in the slot."""

import pytest
import torch

from attacks.objectives.target_nll import TargetNLL
from attacks.scoring.engine import Engine
from attacks.scoring.problem import Problem
from attacks.scoring.residual_gradient import residual_gradient
from tests.attacks.words import TARGET, TEXTS
from vectors.residual import decoder


@pytest.mark.parametrize("caches", [True, False])
def test_the_gradient_is_that_of_a_small_change_in_the_slot(model, tokenizer, caches):
    engine = Engine(model, Problem.from_chat(model, tokenizer, TEXTS[:1], 2))
    if not caches:
        engine.caches = False
        for group in engine._groups:
            group.prefix = group.prefix.uncached
    objective, text, layer = TargetNLL(target_ids=TARGET), [300, 301], 2
    gradient = residual_gradient(engine, objective, layer, text)
    assert gradient.shape == (2, model.config.hidden_size) and gradient.abs().sum() > 0
    change = torch.randn(2, model.config.hidden_size, generator=torch.Generator().manual_seed(0)) * 1e-2
    start = 0 if caches else len(engine.problem.before[0])

    def moved(sign):
        def add(_module, _args, output):
            hidden = (output if isinstance(output, torch.Tensor) else output[0]).clone()
            hidden[0, start : start + 2] += sign * change
            return hidden if isinstance(output, torch.Tensor) else (hidden, *output[1:])

        handle = decoder(model).layers[layer - 1].register_forward_hook(add)
        loss = float(objective(engine, torch.tensor([text]))[0])
        handle.remove()
        return loss

    assert (moved(1) - moved(-1)) / 2 == pytest.approx(float((gradient * change).sum()), rel=0.05)


def test_an_objective_of_an_earlier_layer_has_none(model, tokenizer):
    engine = Engine(model, Problem.from_chat(model, tokenizer, TEXTS[:1], 2))

    def early(engine, candidates):
        return engine.residuals(candidates, [1])[1].sum((1, 2))

    assert residual_gradient(engine, early, 3, [300, 301]).abs().sum() == 0
