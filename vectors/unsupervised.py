"""Unsupervised steering vectors (Mack & Turner 2024, "Mechanistically eliciting latent behaviors", MELBO).

Perturbations of fixed norm at a source layer that change a target layer most. Here many are learned in one batch on the
slice between the two layers, from source activations computed once; nothing else of the model runs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from vectors.controls import random_directions
from vectors.objectives import ChangeNorm, OutputKL, evaluate
from vectors.prompts import Prompts
from vectors.residual import Source, cache_source, decoder, mean_norm, run_slice
from vectors.steering import SteeringVectors, model_id


@dataclass(frozen=True, slots=True, kw_only=True)
class UnsupervisedVectors:
    """Learns vectors on clean prompts, with no label and no trigger."""

    source_layer: int
    """the vector is added after this many blocks"""
    target_layer: int
    """its effect is read after this many blocks"""
    radius: float
    """norm of the vectors, fraction of the mean residual norm at the source layer"""
    count: int = 64
    """vectors"""
    steps: int = 300
    """optimizer steps"""
    lr: float = 0.02
    """AMSGrad step size, fraction of the norm"""
    objective: ChangeNorm | OutputKL = OutputKL()
    """what is maximised"""
    orthogonal: Literal["none", "hard"] = "none"
    """hard: the vectors of a batch stay orthogonal to one another"""
    batch_size: int | None = None
    """vectors per batch; None: all"""

    def __post_init__(self):
        if not 0 <= self.source_layer < self.target_layer:
            raise ValueError(
                f"source layer {self.source_layer} is not before target layer {self.target_layer}; lower source_layer"
            )
        for name in ("radius", "count", "steps", "lr"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be more than 0")

    def __call__(
        self,
        model: PreTrainedModel,
        prompts: Prompts,
        generator: torch.Generator,
        *,
        deadline: Callable[[], bool] | None = None,
    ) -> SteeringVectors:
        """Learns the vectors; `deadline` ends the optimisation early once it returns true.

        Raises:
            ValueError: layers that the model does not have, or more orthogonal vectors than dimensions.
        """
        parts = decoder(model)
        if self.target_layer > len(parts.layers):
            raise ValueError(f"target layer is {self.target_layer} but the model has {len(parts.layers)} layers")
        if self.orthogonal == "hard" and self.count > parts.d_model:
            raise ValueError(f"{self.count} orthogonal vectors do not fit into {parts.d_model} dimensions; lower count")
        source = cache_source(model, prompts, self.source_layer)
        norm = self.radius * mean_norm(source)
        start = norm * random_directions(self.count, parts.d_model, generator).to(source.hidden)
        size = self.count if self.orthogonal == "hard" else self.batch_size or self.count
        learned = [self._learn(model, source, part, norm, deadline) for part in start.split(size)]
        theta, values = (torch.cat(parts) for parts in zip(*learned, strict=True))
        return SteeringVectors(
            theta=theta,
            source_layer=self.source_layer,
            target_layer=self.target_layer,
            radius=self.radius,
            method=f"unsupervised/{type(self.objective).__name__}",
            model_id=model_id(model),
            scores={"objective": values.tolist()},
        )

    def _learn(
        self,
        model: PreTrainedModel,
        source: Source,
        theta: Float[Tensor, "k d"],
        norm: float,
        deadline: Callable[[], bool] | None,
    ) -> tuple[Float[Tensor, "k d"], Float[Tensor, "k"]]:
        """(vectors, objective values) of one batch."""
        theta = onto_sphere(theta.float(), norm, self.orthogonal).requires_grad_()
        optimizer = torch.optim.Adam([theta], lr=self.lr * norm, betas=(0.9, 0.98), amsgrad=True, maximize=True)
        with torch.no_grad():
            clean = run_slice(model, source, source.hidden, to=self.target_layer)
        for _ in range(self.steps):
            if deadline is not None and deadline():
                break
            steered = run_slice(model, source, steered_source(source, theta), to=self.target_layer)
            optimizer.zero_grad()
            evaluate(self.objective, model, steered, clean).sum().backward()
            assert theta.grad is not None
            theta.grad = tangent(theta.grad, theta.detach())
            optimizer.step()
            theta.data = onto_sphere(theta.data, norm, self.orthogonal)
        with torch.no_grad():
            steered = run_slice(model, source, steered_source(source, theta), to=self.target_layer)
            values = evaluate(self.objective, model, steered, clean)
        return theta.detach(), values


def steered_source(source: Source, theta: Float[Tensor, "k d"]) -> Float[Tensor, "rows seq d"]:
    """Source activations with each vector added at every position; row = vector * n + prompt."""
    return (source.hidden + theta[:, None, None].to(source.hidden.dtype)).flatten(0, 1)


def tangent(gradient: Float[Tensor, "k d"], theta: Float[Tensor, "k d"]) -> Float[Tensor, "k d"]:
    """The part of the gradient along the sphere: what would only change the norm is taken out."""
    unit = torch.nn.functional.normalize(theta, dim=-1)
    return gradient - (gradient * unit).sum(-1, keepdim=True) * unit


def onto_sphere(theta: Float[Tensor, "k d"], norm: float, orthogonal: str = "none") -> Float[Tensor, "k d"]:
    """Back to the given norm, and where asked to the nearest orthogonal set by QR."""
    if orthogonal == "hard":
        q, r = torch.linalg.qr(theta.T)
        theta = (q * r.diagonal().sign()).T  # the sign keeps each vector on its own side
    return norm * torch.nn.functional.normalize(theta, dim=-1)
