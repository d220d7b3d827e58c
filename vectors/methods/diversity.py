"""Terms that keep the vectors of a batch apart at the target layer, where it counts: orthogonal thetas alone do not.

Each is a callable on deltas that gives one number per vector, the larger the better. Weights are fractions of the mean
objective, so that one weight serves every objective.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftOrthogonality:
    """Minus the mean squared cosine between a vector's deltas and those of the others, prompt by prompt."""

    weight: float = 1.0
    """weight of the term, fraction of the mean objective"""

    def __call__(self, deltas: Float[Tensor, "k n tokens d"]) -> Float[Tensor, "k"]:
        unit = torch.nn.functional.normalize(deltas.float().flatten(2), dim=-1)
        cosines = torch.einsum("knd,jnd->nkj", unit, unit).square()
        others = cosines.sum(-1) - cosines.diagonal(dim1=1, dim2=2)
        return -(others / max(1, len(deltas) - 1)).mean(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Contrastive:
    """Log-share of positives: the same vector on another prompt attracts, other vectors repel (NoiseCLR, eq. 5).

    After Dalva & Yanardag 2023 (arXiv:2312.05390), on the cosine of deltas; needs two prompts or more.
    """

    weight: float = 1.0
    """weight of the term, fraction of the mean objective"""
    temperature: float = 0.5
    """temperature that the cosines are divided by"""

    def __call__(self, deltas: Float[Tensor, "k n tokens d"]) -> Float[Tensor, "k"]:
        k, n = deltas.shape[:2]
        if n < 2:
            raise ValueError("the contrastive term got 1 prompt; it needs two or more to find positives")
        unit = torch.nn.functional.normalize(deltas.float().flatten(2), dim=-1).flatten(0, 1)
        scores = (unit @ unit.T / self.temperature).unflatten(0, (k, n)).unflatten(2, (k, n))
        same = torch.eye(k, dtype=torch.bool, device=deltas.device)[:, None, :, None]
        itself = same & torch.eye(n, dtype=torch.bool, device=deltas.device)[None, :, None, :]
        scores = scores.masked_fill(itself, -torch.inf)  # (k, n, k, n); no pair of a delta with itself
        positive = scores.masked_fill(~same, -torch.inf).flatten(2).logsumexp(-1)
        return (positive - scores.flatten(2).logsumexp(-1)).mean(1)


Term = SoftOrthogonality | Contrastive


def total(
    value: Float[Tensor, "k"], terms: tuple[Term, ...], deltas: Float[Tensor, "k n tokens d"]
) -> Float[Tensor, "k"]:
    """The objective plus its terms, each times its weight and the current mean absolute objective, held constant."""
    scale = value.detach().abs().mean()
    for term in terms:
        value = value + term.weight * scale * term(deltas)
    return value
