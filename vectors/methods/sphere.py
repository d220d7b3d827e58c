"""AMSGrad on a sphere, as Mack & Turner (2024, MELBO) optimise steering vectors of a fixed norm.

Every step takes the radial part out of the gradient (`tangent`), lets AMSGrad move the vectors off the sphere along
what is left, and scales them back to their norm (`onto_sphere`).
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def tangent(gradient: Float[Tensor, "k d"], theta: Float[Tensor, "k d"]) -> Float[Tensor, "k d"]:
    """The part of each gradient along the sphere; the radial part, which would only change the norm, is removed."""
    unit = torch.nn.functional.normalize(theta, dim=-1)
    return gradient - (gradient * unit).sum(-1, keepdim=True) * unit


def onto_sphere(
    theta: Float[Tensor, "k d"], norm: float, earlier: Float[Tensor, "j d"] | None = None
) -> Float[Tensor, "k d"]:
    """Scales vectors to the given norm.

    Args:
        theta: k vectors.
        norm: that each of them gets.
        earlier: where given, the vectors are first made orthogonal to these and then, by QR, to each other.
    """
    if earlier is not None:
        unit = torch.nn.functional.normalize(earlier, dim=-1)
        theta = theta - theta @ unit.T @ unit  # (k, d): the projection onto the span of the earlier ones is taken out
        q, r = torch.linalg.qr(theta.T)
        theta = (q * r.diagonal().sign()).T  # QR may flip a vector; the sign of R's diagonal turns it back
    return norm * torch.nn.functional.normalize(theta, dim=-1)


def ascend_on_sphere(
    value: Callable[[], Float[Tensor, "k"]],
    parameters: Sequence[Tensor],
    project: Callable[[Tensor], Tensor],
    *,
    lr: float,
    steps: int,
    deadline: Callable[[], bool] | None = None,
    watch: Callable[[Float[Tensor, "k"]], None] | None = None,
) -> None:
    """Maximises the sum of `value()` over tensors whose rows lie on a sphere; the tensors are changed in place.

    Args:
        value: computes the k values to maximise from the tensors as they stand at each step.
        parameters: tensors of shape (k, d), each a leaf that requires a gradient, with its rows on the sphere.
        project: brings a tensor back onto the sphere after a step, `onto_sphere` with the norm filled in.
        lr: AMSGrad step size, in the units of the tensors.
        steps: number of optimizer steps.
        deadline: asked before every step; once it returns true the ascent ends early.
        watch: called at every step with the values before that step.
    """
    # AMSGrad never lets a coordinate's second moment shrink, so step sizes do not grow again late in the ascent.
    optimizer = torch.optim.Adam(list(parameters), lr=lr, betas=(0.9, 0.98), amsgrad=True, maximize=True)
    for _ in range(steps):
        if deadline is not None and deadline():
            break
        optimizer.zero_grad()
        values = value()
        # One backward pass for all k vectors: each value depends on its own vector, apart from terms across a batch.
        values.sum().backward()
        if watch is not None:
            watch(values.detach())
        # Before the moments are updated: a radial part would fill them and be undone by the projection anyway.
        for theta in parameters:
            assert theta.grad is not None
            theta.grad = tangent(theta.grad, theta.detach())
        optimizer.step()
        for theta in parameters:
            theta.data = project(theta.data)
