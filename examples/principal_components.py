"""A new vector method in one file: principal components of activations (Zou et al. 2023, arXiv:2310.01405, RepE).

The directions in which the residuals of different prompts differ most, read at the last token, scaled to a norm. To add
a method of your own, write a class like this one, with these four fields and `__call__`, and a line like the last in
the dict of `vectors/commands/learn.py`; `python -m vectors learn` then has it.
"""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from vectors.checks import check_layers, check_positive
from vectors.prompts import Prompts
from vectors.residual import cache_source, mean_norm
from vectors.steering import SteeringVectors, model_id


@dataclass(frozen=True, slots=True, kw_only=True)
class PrincipalComponents:
    """Vectors along which the prompts themselves vary, the largest variance first."""

    source_layer: int
    """number of blocks after which the activations are read and the vectors added"""
    target_layer: int
    """number of blocks after which the effects of the vectors are compared"""
    radius: float
    """norm of the vectors, fraction of the mean residual norm at the source layer"""
    count: int = 4
    """number of vectors, fewer than there are prompts"""

    def __post_init__(self):
        check_layers(self.source_layer, self.target_layer)
        check_positive(self, "radius", "count")

    @torch.no_grad()
    def __call__(self, model: PreTrainedModel, prompts: Prompts, generator: torch.Generator) -> SteeringVectors:
        """Nothing is drawn: the generator is there because every method gets one.

        Raises:
            ValueError: as many vectors as prompts, or more.
        """
        if self.count >= len(prompts):
            raise ValueError(f"{len(prompts)} prompts differ in {len(prompts) - 1} directions; count is {self.count}")
        source = cache_source(model, prompts, self.source_layer)
        last = source.hidden[:, -1].float()  # (n, d_model): prompts are padded on the left
        _, spread, directions = torch.linalg.svd(last - last.mean(0), full_matrices=False)
        return SteeringVectors(
            theta=self.radius * mean_norm(source) * directions[: self.count],
            source_layer=self.source_layer,
            target_layer=self.target_layer,
            radius=self.radius,
            method="principal components",
            model_id=model_id(model),
            scores={"spread": spread[: self.count].tolist()},
        )


METHODS = {"principal-components": PrincipalComponents}
