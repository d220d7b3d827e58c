"""Second-order baseline: leading Hessian eigenvectors of an unsupervised objective at 0 (Mack & Turner 2024, MELBO).

Both objectives are at their minimum at theta = 0, so their Hessian is the first that tells directions apart. For the
change of the residual (p = 2, q = 1) it is 2 J^T J; for the KL it is the Fisher metric of the next-token distribution,
pulled back to the source layer. Products with it come from differentiating twice, many vectors in one batch.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from vectors.checks import check_layers, check_model, check_positive
from vectors.methods.jacobian import in_batches, leading_subspace
from vectors.methods.objectives import ChangeNorm, OutputKL, evaluate
from vectors.methods.unsupervised import steered_source
from vectors.prompts import Prompts
from vectors.residual import Source, cache_source, mean_norm, run_slice
from vectors.steering import SteeringVectors, model_id


@dataclass(frozen=True, slots=True, kw_only=True)
class HessianVectors:
    """Directions along which an objective curves up most at theta = 0; their sign is arbitrary."""

    source_layer: int
    """number of blocks after which the vector is added"""
    target_layer: int
    """number of blocks after which the vector's effect is read"""
    radius: float
    """norm of the vectors, fraction of the mean residual norm at the source layer"""
    count: int = 64
    """number of vectors"""
    objective: ChangeNorm | OutputKL = ChangeNorm()
    """objective whose Hessian is taken"""
    iterations: int = 20
    """number of power iterations, each one product with the Hessian"""
    batch_size: int | None = None
    """number of vectors per forward and backward pass; None: all"""

    def __post_init__(self):
        check_layers(self.source_layer, self.target_layer)
        check_positive(self, "radius", "count", "iterations", "batch_size")
        if isinstance(self.objective, ChangeNorm) and (self.objective.p, self.objective.q) != (2, 1):
            raise ValueError(
                f"the Hessian of ChangeNorm with p={self.objective.p:g}, q={self.objective.q:g} vanishes or does not "
                "exist at 0; use p=2, q=1 or OutputKL"
            )

    def __call__(self, model: PreTrainedModel, prompts: Prompts, generator: torch.Generator) -> SteeringVectors:
        """The leading eigenvectors, largest eigenvalue first.

        Raises:
            ValueError: layers that the model does not have, or more vectors than dimensions.
        """
        check_model(model, self.target_layer, self.count)
        source = cache_source(model, prompts, self.source_layer)
        with torch.no_grad():
            clean = run_slice(model, source, source.hidden, to=self.target_layer)
        product = in_batches(lambda v: self._product(model, source, clean, v), self.batch_size)
        v = leading_subspace(product, source, self.count, self.iterations, generator)
        inside = v @ product(v).T
        values, rotation = torch.linalg.eigh((inside + inside.T) / 2)  # Rayleigh-Ritz inside the subspace
        return SteeringVectors(
            theta=self.radius * mean_norm(source) * (rotation.T @ v).flip(0)[: self.count],
            source_layer=self.source_layer,
            target_layer=self.target_layer,
            radius=self.radius,
            method=f"hessian/{type(self.objective).__name__}",
            model_id=model_id(model),
            scores={"eigenvalue": values.flip(0)[: self.count].tolist()},
        )

    @torch.enable_grad()
    def _product(
        self, model: PreTrainedModel, source: Source, clean: Float[Tensor, "n seq d"], v: Float[Tensor, "k d"]
    ) -> Float[Tensor, "k d"]:
        """Hessian at 0 times each vector."""
        theta = torch.zeros_like(v, requires_grad=True)
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
            steered = run_slice(model, source, steered_source(source, theta), to=self.target_layer)
            value = evaluate(self.objective, model, steered, clean).sum()
            # Hessian-vector products as the gradient of <gradient, v>; each vector has a theta of its own.
            (gradient,) = torch.autograd.grad(value, theta, create_graph=True)
            return torch.autograd.grad((gradient * v).sum(), theta)[0]
