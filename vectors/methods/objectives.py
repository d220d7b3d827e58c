"""What an unsupervised vector maximises at the target layer: callables on the last positions' residuals."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from vectors.residual import unembed


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeNorm:
    """sum_i ( sum_tokens norm(delta_i,tok)^p )^(1/q), norm over d_model (Mack & Turner 2024, MELBO, eq. 1)."""

    p: float = 2.0
    """exponent of each token's change"""
    q: float = 1.0
    """root over a prompt's tokens"""
    tokens: int = 3
    """last positions of the prompt that count"""

    def reference(self, _model: PreTrainedModel, clean: Float[Tensor, "n tokens d"]) -> Float[Tensor, "n tokens d"]:
        """What steered residuals are compared with."""
        return clean

    def __call__(
        self, _model: PreTrainedModel, steered: Float[Tensor, "k n tokens d"], clean: Float[Tensor, "n tokens d"]
    ) -> Float[Tensor, "k"]:
        return self.magnitude(steered - clean)

    def magnitude(self, change: Float[Tensor, "k n tokens d"]) -> Float[Tensor, "k"]:
        """The formula itself."""
        change = change.float()
        if self.p >= 2:  # twice differentiable at 0, which norm() is not
            powers = change.square().sum(-1).pow(self.p / 2)
        else:  # gradient 0 at 0, where a root of squares would give nan
            powers = change.norm(dim=-1).pow(self.p)
        return powers.sum(-1).pow(1 / self.q).sum(-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class NormalizedChange:
    """`ChangeNorm` of h / norm(h): a residual's length, which the final norm takes out anyway, earns nothing."""

    p: float = 2.0
    """exponent of each token's change"""
    q: float = 1.0
    """root over a prompt's tokens"""
    tokens: int = 3
    """last positions of the prompt that count"""

    def reference(self, _model: PreTrainedModel, clean: Float[Tensor, "n tokens d"]) -> Float[Tensor, "n tokens d"]:
        """Directions of the clean residuals."""
        return torch.nn.functional.normalize(clean.float(), dim=-1)

    def __call__(
        self, _model: PreTrainedModel, steered: Float[Tensor, "k n tokens d"], clean: Float[Tensor, "n tokens d"]
    ) -> Float[Tensor, "k"]:
        change = torch.nn.functional.normalize(steered.float(), dim=-1) - clean
        return ChangeNorm(p=self.p, q=self.q).magnitude(change)


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputKL:
    """KL(steered || clean) of the next-token distribution read at the target layer, nats, summed over prompts.

    Read through the final norm and the unembedding at the last prompt token. Bounded in practice by the clean model's
    rarest token, it rewards a *decided* other answer, where the raw norm rewards any high-gain direction.
    """

    tokens: int = 1
    """last positions of the prompt that count"""
    direction: Literal["steered||clean", "clean||steered"] = "steered||clean"
    """the other direction rewards what the clean model would say becoming impossible, whatever takes its place"""

    def reference(self, model: PreTrainedModel, clean: Float[Tensor, "n tokens d"]) -> Float[Tensor, "n tokens vocab"]:
        """Log-probabilities of the clean model."""
        return unembed(model, clean).float().log_softmax(-1)

    def __call__(
        self, model: PreTrainedModel, steered: Float[Tensor, "k n tokens d"], clean: Float[Tensor, "n tokens vocab"]
    ) -> Float[Tensor, "k"]:
        logprobs = unembed(model, steered).float().log_softmax(-1)
        p, q = (logprobs, clean) if self.direction == "steered||clean" else (clean, logprobs)
        return (p.exp() * (p - q)).sum(-1).sum(dim=(1, 2))


Objective = ChangeNorm | NormalizedChange | OutputKL


def evaluate(
    objective: Objective,
    model: PreTrainedModel,
    steered: Float[Tensor, "rows seq d"],
    clean: Float[Tensor, "n seq d"],
) -> Float[Tensor, "k"]:
    """Objective of each vector from full sequences, rows ordered vector-major."""
    last = steered[:, -objective.tokens :].unflatten(0, (-1, len(clean)))
    with torch.no_grad():
        reference = objective.reference(model, clean[:, -objective.tokens :])
    return objective(model, last, reference)
