"""Linear baseline: leading right singular vectors of the source-to-target Jacobian (Mack & Turner 2024, MELBO).

The Jacobian at theta = 0 has one row per prompt, position and target dimension. It is never built: block power
iteration needs only J v (forward mode) and J^T u (backward), many vectors in one batch on the slice.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from vectors.checks import check_layers, check_model, check_positive
from vectors.methods.controls import random_directions
from vectors.methods.unsupervised import steered_source
from vectors.prompts import Prompts
from vectors.residual import Source, cache_source, mean_norm, run_slice
from vectors.steering import SteeringVectors, model_id

OVERSAMPLING = 8
"""Number of vectors iterated beyond those wanted: each wanted one converges by its gap to the first left out"""


@dataclass(frozen=True, slots=True, kw_only=True)
class JacobianVectors:
    """Directions that change the target layer most to first order; their sign is arbitrary."""

    source_layer: int
    """number of blocks after which the vector is added"""
    target_layer: int
    """number of blocks after which the vector's effect is read"""
    radius: float
    """norm of the vectors, fraction of the mean residual norm at the source layer"""
    count: int = 64
    """number of vectors"""
    tokens: int = 3
    """number of last prompt positions that count"""
    iterations: int = 20
    """number of power iterations, each one product with J^T J"""
    batch_size: int | None = None
    """number of vectors per forward and backward pass; None: all"""

    def __post_init__(self):
        check_layers(self.source_layer, self.target_layer)
        check_positive(self, "radius", "count", "tokens", "iterations", "batch_size")

    def __call__(self, model: PreTrainedModel, prompts: Prompts, generator: torch.Generator) -> SteeringVectors:
        """The leading singular vectors, largest singular value first.

        Raises:
            ValueError: layers that the model does not have, or more vectors than dimensions.
        """
        check_model(model, self.target_layer, self.count)
        source = cache_source(model, prompts, self.source_layer)

        def forwards(v: Float[Tensor, "k d"]) -> Float[Tensor, "k n tokens d"]:
            return push(model, source, torch.zeros_like(v), v, self.target_layer, self.tokens)

        def product(v: Float[Tensor, "k d"]) -> Float[Tensor, "k d"]:
            return pull(model, source, torch.zeros_like(v), forwards(v), self.target_layer, self.tokens)

        v = leading_subspace(in_batches(product, self.batch_size), source, self.count, self.iterations, generator)
        # The images of the rows under J span its leading left singular vectors: an SVD in that small space is enough.
        images = in_batches(forwards, self.batch_size)(v).flatten(1)
        rotation, values, _ = torch.linalg.svd(images, full_matrices=False)  # Rayleigh-Ritz inside the subspace
        return SteeringVectors(
            theta=self.radius * mean_norm(source) * (rotation.T @ v)[: self.count],
            source_layer=self.source_layer,
            target_layer=self.target_layer,
            radius=self.radius,
            method="jacobian",
            model_id=model_id(model),
            scores={"singular_value": values[: self.count].tolist()},
        )


@torch.no_grad()
def push(
    model: PreTrainedModel,
    source: Source,
    base: Float[Tensor, "k d"],
    directions: Float[Tensor, "k d"],
    to: int,
    tokens: int | None,
) -> Float[Tensor, "k n tokens d"]:
    """J(base) v: exact change of residual `to` per unit of `directions`, added at every source position beside `base`.

    One forward-mode pass.

    Args:
        model: a causal decoder.
        source: activations of the n prompts at the source layer.
        base: k vectors at which the Jacobian is taken.
        directions: k vectors v.
        to: number of blocks after which the change is read.
        tokens: number of last positions that are returned; None: all. Changes at padding are 0.
    """
    with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):  # fused attention has no forward-mode derivative
        with warnings.catch_warnings():  # the first call loads rules of torch that use the deprecated torch.jit
            warnings.simplefilter("ignore", DeprecationWarning)
            theta = forward_ad.make_dual(base.float(), directions.float())
        steered = run_slice(model, source, steered_source(source, theta), to=to)
        change = forward_ad.unpack_dual(steered).tangent
    assert change is not None
    change = last(change, tokens).float().unflatten(0, (len(base), -1))
    return change.masked_fill(~last(source.mask, tokens).bool()[..., None], 0)


@torch.enable_grad()
def pull(
    model: PreTrainedModel,
    source: Source,
    base: Float[Tensor, "k d"],
    cotangents: Float[Tensor, "k n tokens d"],
    to: int,
    tokens: int | None,
) -> Float[Tensor, "k d"]:
    """J(base)^T u, the adjoint of `push` with the same arguments; one backward pass. u at padding does not count."""
    theta = base.detach().float().requires_grad_()
    steered = last(run_slice(model, source, steered_source(source, theta), to=to), tokens)
    real = cotangents.masked_fill(~last(source.mask, tokens).bool()[..., None], 0)
    return torch.autograd.grad(steered, theta, real.flatten(0, 1).to(steered.dtype))[0]


def last(values: Tensor, tokens: int | None) -> Tensor:
    """The last positions along the second axis; None keeps all."""
    return values if tokens is None else values[:, -tokens:]


def leading_subspace(
    product: Callable[[Tensor], Tensor], source: Source, count: int, iterations: int, generator: torch.Generator
) -> Float[Tensor, "wider d"]:
    """Orthonormal rows that span the leading eigenvectors of a symmetric product and, as slack, a few more."""
    width = source.hidden.shape[-1]
    v = random_directions(min(count + OVERSAMPLING, width), width, generator).to(source.hidden.device)
    # Block power iteration; QR keeps the rows from all turning into the leading eigenvector.
    for _ in range(iterations):
        v = torch.linalg.qr(product(v).T).Q.T
    return v


def in_batches(function: Callable[[Tensor], Tensor], batch_size: int | None) -> Callable[[Tensor], Tensor]:
    """The same function of row vectors, a batch at a time."""
    return lambda rows: torch.cat([function(part) for part in rows.split(batch_size or len(rows))])
