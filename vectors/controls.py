"""Random vectors of equal norm: the control that every learned vector stands beside."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from vectors.steering import SteeringVectors


def random_directions(count: int, d_model: int, generator: torch.Generator) -> Float[Tensor, "k d"]:
    """Unit vectors, uniform over the sphere; drawn on the CPU so that every device gets the same."""
    return torch.nn.functional.normalize(torch.randn(count, d_model, generator=generator), dim=-1)


def random_vectors(like: SteeringVectors, generator: torch.Generator, count: int | None = None) -> SteeringVectors:
    """As many random vectors with the norm, the layers and the model of `like`."""
    norm = float(like.theta[0].norm())
    theta = norm * random_directions(count or len(like), like.theta.shape[1], generator).to(like.theta)
    return replace(like, theta=theta, method="random", scores={})
