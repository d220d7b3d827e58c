"""Mean-difference vector: mean residual on one set of prompts minus that on another; nothing is optimised.

"Difference of means" of Marks & Tegmark 2023 (arXiv:2310.06824); added to the stream it is contrastive activation
addition (Rimsky et al. 2023, arXiv:2312.06681).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from vectors.checks import check_layers
from vectors.prompts import Prompts
from vectors.residual import cache_source, check_layer, mean_norm
from vectors.steering import SteeringVectors, model_id


@dataclass(frozen=True, slots=True, kw_only=True)
class MeanDifference:
    """From the mean of the negative prompts to that of the positive ones."""

    source_layer: int
    """the residual is read, and the vector added, after this many blocks"""
    target_layer: int
    """noted with the vector as the layer to compare effects at"""
    tokens: int = 1
    """last positions of each prompt that are averaged; all of a prompt that has fewer"""
    radius: float | None = None
    """norm of the vector, fraction of the mean residual norm on the negative prompts; None: the difference's own"""

    def __post_init__(self):
        check_layers(self.source_layer, self.target_layer)
        if self.tokens < 1:
            raise ValueError(f"tokens is {self.tokens}; it must be at least 1")
        if self.radius is not None and self.radius <= 0:
            raise ValueError(f"radius is {self.radius}; it must be more than 0, or None for the difference's own norm")

    def __call__(self, model: PreTrainedModel, positive: Prompts, negative: Prompts) -> SteeringVectors:
        """One vector; `scores` holds the difference's own norm and the separation of the two sets along it.

        The separation is measured on the prompts that gave the vector, so it flatters where they are few.

        Raises:
            ValueError: layers that the model does not have, or sets with equal means.
        """
        check_layer(model, self.target_layer, "target layer")
        source = cache_source(model, negative, self.source_layer)
        unit = mean_norm(source)
        away = last_mean(source.hidden, negative.attention_mask, self.tokens)
        towards = cache_source(model, positive, self.source_layer).hidden
        towards = last_mean(towards, positive.attention_mask, self.tokens)
        difference = towards.mean(0) - away.mean(0)
        norm = float(difference.norm())
        if norm <= torch.finfo(source.hidden.dtype).eps * unit:
            raise ValueError(
                f"the {len(positive)} positive and {len(negative)} negative prompts have the same mean residual at "
                f"layer {self.source_layer}; give sets that differ in their last {self.tokens} tokens or before"
            )
        radius = norm / unit if self.radius is None else self.radius
        return SteeringVectors(
            theta=(radius * unit / norm * difference)[None].float(),
            source_layer=self.source_layer,
            target_layer=self.target_layer,
            radius=radius,
            method="mean difference",
            model_id=model_id(model),
            scores={"norm": [norm], "separation": [cohens_d(towards @ difference, away @ difference)]},
        )


def last_mean(hidden: Float[Tensor, "n seq d"], mask: Tensor, tokens: int) -> Float[Tensor, "n d"]:
    """Each prompt's mean over its last real positions, in double precision: a difference of means cancels digits."""
    real = mask[:, -tokens:, None].double()
    return (hidden[:, -tokens:].double() * real).sum(1) / real.sum(1)


def cohens_d(high: Float[Tensor, "a"], low: Float[Tensor, "b"]) -> float:
    """Difference of the means in pooled standard deviations (Cohen 1988); infinite where neither set varies."""
    squares = (high - high.mean()).square().sum() + (low - low.mean()).square().sum()
    spread = (squares / max(len(high) + len(low) - 2, 1)).sqrt()
    return float((high.mean() - low.mean()) / spread)
