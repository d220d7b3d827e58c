"""Gradient of an objective by the residual stream in the slot, which tells what a text has to leave there."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from attacks.scoring.engine import Engine, Objective
from vectors.residual import changed


def residual_gradient(engine: Engine, objective: Objective, layer: int, text: Sequence[int]) -> Float[Tensor, "t d"]:
    """Gradient of the objective by the residual after so many blocks, at each of the text's t tokens.

    Args:
        engine: of one prompt.
        objective: of the text in the slot.
        layer: from 1 on.
        text: token ids.
    """
    found: list[Tensor] = []

    def hold(hidden: Tensor) -> Tensor:
        # Not a leaf: the hooks that count operations take none.
        found.append(hidden.detach().requires_grad_().clone())
        return found[-1]

    with torch.enable_grad(), changed(engine.model, layer, hold):
        loss = objective(engine, torch.tensor([list(text)], device=engine.device))
        each = torch.autograd.grad(loss.sum(), found, allow_unused=True) if found else ()
    gradients = [some for some in each if some is not None]
    if not gradients:  # the objective looks at an earlier layer
        return torch.zeros(len(text), engine.embedded.weight.shape[1])
    # Without a cache every forward pass begins with the prompt.
    start = 0 if engine.caches else len(engine.problem.before[0])
    return torch.stack([some[0, start : start + len(text)].float() for some in gradients]).sum(0).cpu()
