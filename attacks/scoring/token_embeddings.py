"""What tokens are embedded as: ids or mixtures of tokens in, rows of the residual stream out, the matrix never copied.

Gemma multiplies embeddings by a factor inside the module. The factor is applied to the few rows that were looked up,
and by the chain rule to their gradients, so that no scaled matrix of `vocab d_model` is made.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from vectors.residual import embedding


class TokenEmbeddings:
    """The embedding module of one model, for ids and for mixtures of tokens."""

    def __init__(self, model: PreTrainedModel):
        """Raises ValueError where the module does something else than to multiply the rows of its weight."""
        self.weight = embedding(model)
        self._scale = _scale(model.get_input_embeddings())

    def __call__(
        self, candidates: Int[Tensor, "rows seq"] | Float[Tensor, "rows seq vocab"]
    ) -> Float[Tensor, "rows seq d_model"]:
        """Embeddings of ids, or of mixtures of tokens, through which a gradient flows."""
        rows = candidates @ self.weight if candidates.is_floating_point() else self.weight[candidates]
        return rows if self._scale is None else rows * self._scale

    @property
    def matrix(self) -> Float[Tensor, "vocab d_model"]:
        """What every token is embedded as: a copy of the whole weight where the module scales it."""
        return self.weight if self._scale is None else self.weight * self._scale


@torch.no_grad()
def _scale(module: Any) -> Float[Tensor, "d_model"] | None:
    """What the module multiplies each row of its weight by; None for nothing."""
    some = torch.arange(min(8, len(module.weight)), device=module.weight.device)
    found = module(some)
    if torch.equal(found, module.weight[some]):
        return None
    # The same module with ones as its weight, a view of a single number, returns its factors.
    ones = {"weight": module.weight.new_ones(1, 1).expand(module.weight.shape)}
    scale = torch.func.functional_call(module, ones, (some[:1],))[0]
    if not torch.equal(found, module.weight[some] * scale):
        raise ValueError(f"{type(module).__name__} embeds tokens in a way that is not known here; it is not supported")
    return scale
