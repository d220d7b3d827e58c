"""What an unsupervised vector maximises at the target layer: callables on the last positions' residuals."""

from dataclasses import dataclass

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
        norms = (steered - clean).float().norm(dim=-1)
        return norms.pow(self.p).sum(-1).pow(1 / self.q).sum(-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputKL:
    """KL(steered || clean) of the next-token distribution read at the target layer, nats, summed over prompts.

    Read through the final norm and the unembedding at the last prompt token. Bounded in practice by the clean model's
    rarest token, it rewards a *decided* other answer, where the raw norm rewards any high-gain direction.
    """

    tokens: int = 1
    """last positions of the prompt that count"""

    def reference(self, model: PreTrainedModel, clean: Float[Tensor, "n tokens d"]) -> Float[Tensor, "n tokens vocab"]:
        """Log-probabilities of the clean model."""
        return unembed(model, clean).float().log_softmax(-1)

    def __call__(
        self, model: PreTrainedModel, steered: Float[Tensor, "k n tokens d"], clean: Float[Tensor, "n tokens vocab"]
    ) -> Float[Tensor, "k"]:
        logprobs = unembed(model, steered).float().log_softmax(-1)
        return (logprobs.exp() * (logprobs - clean)).sum(-1).sum(dim=(1, 2))


def evaluate(
    objective: ChangeNorm | OutputKL,
    model: PreTrainedModel,
    steered: Float[Tensor, "rows seq d"],
    clean: Float[Tensor, "n seq d"],
) -> Float[Tensor, "k"]:
    """Objective of each vector from full sequences, rows ordered vector-major."""
    last = steered[:, -objective.tokens :].unflatten(0, (-1, len(clean)))
    with torch.no_grad():
        reference = objective.reference(model, clean[:, -objective.tokens :])
    return objective(model, last, reference)
