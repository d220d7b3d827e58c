"""Objectives that unsupervised vectors maximise: how much the residual at the target layer changes under each vector.

An objective is called with the residuals of k vectors on n prompts at the last `tokens` positions, and with its own
`reference` of the clean residuals there, which does not depend on the vectors; it returns one value per vector, a sum
over prompts. So `evaluate` may split the rows (vectors x prompts) of an objective that reads logits into pieces, which
bounds the memory whatever the vocabulary.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from vectors.residual import embedding, unembed

LOGITS = 2**24
"""Logits (vectors x prompts x tokens x vocabulary) that are held at once. A forward and backward pass takes about ten
float32 numbers for each, so 700 MB; a single vector on a single prompt is never split."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeNorm:
    """sum_i ( sum_tokens norm(delta_i,tok)^p )^(1/q), norm over d_model (Mack & Turner 2024, MELBO, eq. 1)."""

    p: float = 2.0
    """exponent of the norm of each token's change"""
    q: float = 1.0
    """the q-th root is taken of the sum over a prompt's tokens"""
    tokens: int = 3
    """number of last prompt positions that count"""

    def reference(self, _model: PreTrainedModel, clean: Float[Tensor, "n tokens d"]) -> Float[Tensor, "n tokens d"]:
        """The clean residuals, which steered ones are compared with."""
        return clean

    def __call__(
        self, _model: PreTrainedModel, steered: Float[Tensor, "k n tokens d"], clean: Float[Tensor, "n tokens d"]
    ) -> Float[Tensor, "k"]:
        return self.magnitude(steered - clean)

    def magnitude(self, change: Float[Tensor, "k n tokens d"]) -> Float[Tensor, "k"]:
        """The formula for changes of the residual."""
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
    """exponent of the norm of each token's change"""
    q: float = 1.0
    """the q-th root is taken of the sum over a prompt's tokens"""
    tokens: int = 3
    """number of last prompt positions that count"""

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
    """number of last prompt positions that count"""
    direction: Literal["steered||clean", "clean||steered"] = "steered||clean"
    """which distribution the expectation is over; clean||steered rewards making the clean model's tokens unlikely"""
    left_out: tuple[int, ...] = ()
    """tokens left out of both distributions; with those that end a reply or are blank (`vectors.generate.mute_tokens`)
    no vector gains by ending the reply, which in a chat model is the cheapest decided answer of all"""

    def reference(self, model: PreTrainedModel, clean: Float[Tensor, "n tokens d"]) -> Float[Tensor, "n tokens vocab"]:
        """Log-probabilities of the clean model."""
        return self._logprobs(model, clean)

    def __call__(
        self, model: PreTrainedModel, steered: Float[Tensor, "k n tokens d"], clean: Float[Tensor, "n tokens vocab"]
    ) -> Float[Tensor, "k"]:
        logprobs = self._logprobs(model, steered)
        p, q = (logprobs, clean) if self.direction == "steered||clean" else (clean, logprobs)
        return (p.exp() * (p - q)).sum(-1).sum(dim=(1, 2))

    def _logprobs(self, model: PreTrainedModel, hidden: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows vocab"]:
        """Log-probabilities over the tokens that count; the others have so little that they add nothing."""
        logits = unembed(model, hidden).float()
        if self.left_out:
            # Not minus infinity: 0 times infinity is no number.
            logits = logits.index_fill(-1, torch.tensor(self.left_out, device=logits.device), -1e4)
        return logits.log_softmax(-1)


Objective = ChangeNorm | NormalizedChange | OutputKL


def evaluate(
    objective: Objective,
    model: PreTrainedModel,
    steered: Float[Tensor, "rows seq d"],
    clean: Float[Tensor, "n seq d"],
) -> Float[Tensor, "k"]:
    """Objective of each vector from whole sequences; rows are ordered by vector, then prompt (rows = k * n).

    Where the logits of all rows would be more than `LOGITS`, pieces of the rows are computed one after another, and
    once more in the backward pass instead of being stored (Chen et al. 2016, arXiv:1604.06174).
    """
    last = steered[:, -objective.tokens :].unflatten(0, (-1, len(clean)))
    before = clean[:, -objective.tokens :]
    rows = len(last) * len(before)
    fit = max(1, LOGITS // (objective.tokens * len(embedding(model)))) if isinstance(objective, OutputKL) else rows
    if rows <= fit:
        return _values(objective, model, last, before)
    # As many vectors as fit on one prompt, then as many prompts: a piece makes the references of its prompts anew. The
    # clock of operations takes both of its forward passes for differentiated ones, and so counts four instead of three.
    vectors = min(fit, len(last))
    values = []
    for some in last.split(vectors):
        pieces = zip(some.split(fit // vectors, dim=1), before.split(fit // vectors), strict=True)
        parts = [checkpoint(_values, objective, model, *piece, use_reentrant=False) for piece in pieces]
        values.append(torch.stack(parts).sum(0))
    return torch.cat(values)


def _values(
    objective: Objective,
    model: PreTrainedModel,
    last: Float[Tensor, "k n tokens d"],
    before: Float[Tensor, "n tokens d"],
) -> Float[Tensor, "k"]:
    """Objective of each vector on some prompts, all rows at once."""
    with torch.no_grad():
        reference = objective.reference(model, before)
    return objective(model, last, reference)
