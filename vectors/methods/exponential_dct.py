"""Exponential deep causal transcoding (Mack & Turner 2024, "Deep causal transcoding", DCT).

The change of the target layer is fitted by sum_l alpha_l u_l (exp(<v_l, theta>) - 1); its factors at radius R maximise
sum_l <u_l, delta(R v_l)>. Orthogonalised gradient iteration does that: like power iteration, but every gradient is
taken at the vector itself, so on a linear slice it ends at the singular vectors of the averaged Jacobian.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedModel

from vectors.checks import check_layers, check_model, check_positive
from vectors.methods.controls import random_directions
from vectors.methods.jacobian import in_batches, last, pull
from vectors.methods.unsupervised import steered_source
from vectors.prompts import Prompts
from vectors.residual import Source, cache_source, mean_norm, run_slice
from vectors.steering import SteeringVectors, model_id


@dataclass(frozen=True, slots=True, kw_only=True)
class ExponentialDCT:
    """Vectors of a fixed norm whose mean effect on the target layer is largest, kept apart from one another."""

    source_layer: int
    """number of blocks after which the vector is added"""
    target_layer: int
    """number of blocks after which the vector's effect is read"""
    radius: float
    """R: norm of the vectors, fraction of the mean residual norm at the source layer"""
    count: int = 64
    """number of factors, one vector each"""
    iterations: int = 10
    """number of gradient iterations"""
    tokens: int = 3
    """number of last prompt positions that the effect is averaged over"""
    orthogonal: Literal["hard", "soft"] = "hard"
    """hard: vectors are orthogonal; soft: vectors repel one another, and may be more than the dimensions"""
    repulsion: float = 1.0
    """strength of the repulsion where orthogonal is soft; 0: none, a very large one gives orthogonal vectors"""
    batch_size: int | None = None
    """number of vectors per forward and backward pass; None: all"""

    def __post_init__(self):
        check_layers(self.source_layer, self.target_layer)
        check_positive(self, "radius", "count", "iterations", "tokens", "batch_size")
        if self.orthogonal not in ("hard", "soft"):
            raise ValueError(f"orthogonal is {self.orthogonal!r}; give 'hard' or 'soft'")
        if self.repulsion < 0:
            raise ValueError(f"repulsion is {self.repulsion}; it must be 0 or more")

    def __call__(self, model: PreTrainedModel, prompts: Prompts, generator: torch.Generator) -> SteeringVectors:
        """The vectors, most important first; importance is the norm of the mean change at the target layer.

        Raises:
            ValueError: layers that the model does not have, or more orthogonal vectors than dimensions.
        """
        check_model(model, self.target_layer, self.count if self.orthogonal == "hard" else 1)
        source = cache_source(model, prompts, self.source_layer)
        norm = self.radius * mean_norm(source)
        with torch.no_grad():
            clean = run_slice(model, source, source.hidden, to=self.target_layer)

        @torch.enable_grad()
        def ascend(v: Float[Tensor, "k d"]) -> Float[Tensor, "k d"]:
            theta = (norm * v).requires_grad_()
            delta = self._delta(model, source, clean, theta)
            u = normalize(delta.detach(), dim=-1)  # the best u for this v, held fixed
            return torch.autograd.grad((u * delta).sum(), theta)[0]  # J(R v)^T u

        # Orthogonalised gradient iteration: gradients at all vectors, then the vectors are kept apart.
        v = self._start(model, source, generator)
        for _ in range(self.iterations):
            v = in_batches(ascend, self.batch_size)(self._apart(v))
        theta = norm * self._apart(v)
        with torch.no_grad():
            deltas = in_batches(lambda part: self._delta(model, source, clean, part), self.batch_size)(theta)
        importance, order = deltas.norm(dim=-1).sort(descending=True)  # <u, delta> with u along delta
        return SteeringVectors(
            theta=theta[order],
            source_layer=self.source_layer,
            target_layer=self.target_layer,
            radius=self.radius,
            method=f"exponential-dct/{self.orthogonal}",
            model_id=model_id(model),
            scores={"importance": importance.tolist()},
        )

    def _start(self, model: PreTrainedModel, source: Source, generator: torch.Generator) -> Float[Tensor, "k d"]:
        """J(0)^T u of random u: directions that the target layer hears, unlike random v."""
        u = random_directions(self.count, source.hidden.shape[-1], generator).to(source.hidden.device)
        shape = last(source.mask, self.tokens).shape

        def warm(u: Float[Tensor, "k d"]) -> Float[Tensor, "k d"]:
            everywhere = u[:, None, None].expand(-1, *shape, -1)
            return pull(model, source, torch.zeros_like(u), everywhere, self.target_layer, self.tokens)

        return in_batches(warm, self.batch_size)(u)

    def _delta(
        self, model: PreTrainedModel, source: Source, clean: Float[Tensor, "n seq d"], theta: Float[Tensor, "k d"]
    ) -> Float[Tensor, "k d"]:
        """Change of the target residual, mean over prompts and their last tokens."""
        steered = run_slice(model, source, steered_source(source, theta), to=self.target_layer)
        change = last(steered, self.tokens).float().unflatten(0, (len(theta), -1)) - last(clean, self.tokens).float()
        real = last(source.mask, self.tokens).bool()[..., None]
        return change.masked_fill(~real, 0).sum(dim=(1, 2)) / real.sum()

    def _apart(self, v: Float[Tensor, "k d"]) -> Float[Tensor, "k d"]:
        """Unit vectors: orthogonal ones, or pushed away from one another."""
        if self.orthogonal == "hard":
            q, r = torch.linalg.qr(v.T)
            return (q * r.diagonal().sign()).T  # each vector keeps its side: v and -v do different things
        # (1 + r G)^(-1/2) V. To first order the gradient step V - r (G - 1) V, which overshoots where many vectors
        # point the same way; this one never turns the order of the Gram matrix' eigenvalues round.
        v = normalize(v, dim=-1)
        values, axes = torch.linalg.eigh(v @ v.T)
        shrink = (1 + self.repulsion * values.clamp(min=0)).rsqrt()
        return normalize(axes @ (shrink[:, None] * (axes.T @ v)), dim=-1)
