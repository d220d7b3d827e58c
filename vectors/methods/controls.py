"""Random vectors of equal norm: the control that learned vectors are compared with."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from vectors.prompts import Prompts
from vectors.residual import cache_source, mean_norm
from vectors.steering import SteeringVectors, model_id


def random_directions(count: int, d_model: int, generator: torch.Generator) -> Float[Tensor, "k d"]:
    """Unit vectors, uniform over the sphere; drawn on the CPU so that every device gets the same."""
    return torch.nn.functional.normalize(torch.randn(count, d_model, generator=generator), dim=-1)


def random_vectors(like: SteeringVectors, generator: torch.Generator, count: int | None = None) -> SteeringVectors:
    """As many random vectors with the norm, the layers and the model of `like`."""
    if like.adapter_rank:
        raise ValueError("random rows are no random adapters; compare adapters with UnsupervisedAdapters of one step")
    # Learned vectors of one file have one norm, so that of the first is all that is needed.
    norm = float(like.theta[0].norm())
    theta = norm * random_directions(count or len(like), like.theta.shape[1], generator).to(like.theta)
    return replace(like, theta=theta, method="random", scores={})


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomVectors:
    """As many random vectors of a given radius: the control, callable like a method."""

    source_layer: int
    """number of blocks after which the vector is added"""
    target_layer: int
    """number of blocks after which effects of the vectors are compared later on; it changes nothing in the draw"""
    radius: float
    """norm of the vectors, fraction of the mean residual norm at the source layer"""
    count: int = 100
    """number of vectors"""

    def __call__(self, model: PreTrainedModel, prompts: Prompts, generator: torch.Generator) -> SteeringVectors:
        """Draws them; the prompts only give the unit of the radius."""
        source = cache_source(model, prompts, self.source_layer)
        directions = random_directions(self.count, source.hidden.shape[-1], generator).to(source.hidden.device)
        return SteeringVectors(
            theta=self.radius * mean_norm(source) * directions,
            source_layer=self.source_layer,
            target_layer=self.target_layer,
            radius=self.radius,
            method="random",
            model_id=model_id(model),
        )
