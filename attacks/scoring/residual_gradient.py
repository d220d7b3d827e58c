"""Gradient of an objective by the residual stream in the slot, which tells what a text has to leave there."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from attacks.scoring.engine import Engine, Objective
from vectors.residual import decoder, stream


def residual_gradient(engine: Engine, objective: Objective, layer: int, text: Sequence[int]) -> Float[Tensor, "t d"]:
    """Gradient of the objective by the residual after so many blocks, at each of the text's t tokens.

    Args:
        engine: of one prompt.
        objective: of the text in the slot.
        layer: from 1 on.
        text: token ids.
    """
    with torch.enable_grad(), _residuals(engine, layer) as found:
        loss = objective(engine, torch.tensor([list(text)], device=engine.device))
        each = torch.autograd.grad(loss.sum(), found, allow_unused=True) if found else ()
    gradients = [some for some in each if some is not None]
    if not gradients:  # the objective looks at an earlier layer
        return torch.zeros(len(text), engine.embedded.weight.shape[1])
    # Without a cache every forward pass begins with the prompt.
    start = 0 if engine.caches else len(engine.problem.before[0])
    return torch.stack([some[0, start : start + len(text)].float() for some in gradients]).sum(0).cpu()


@contextmanager
def _residuals(engine: Engine, layer: int) -> Iterator[list[Tensor]]:
    """Holds the residual of each forward pass that is run meanwhile, as a leaf that gradients can be taken by."""
    found: list[Tensor] = []

    def on_output(_module, _args, output):
        # Not a leaf: the hooks that count operations take none.
        hidden = stream(output).detach().requires_grad_().clone()
        found.append(hidden)
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

    handle = decoder(engine.model).layers[layer - 1].register_forward_hook(on_output)
    try:
        yield found
    finally:
        handle.remove()
