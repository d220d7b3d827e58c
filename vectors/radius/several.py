"""Several radii round a centre, for a pool of vectors of different norms."""

from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vectors.prompts import Prompts
from vectors.radius.rule import Progress, RadiusChoice, RadiusRule, check_radii


@dataclass(frozen=True, slots=True, kw_only=True)
class SeveralRadii:
    """Several radii round a centre: no one radius suits every planted behaviour, a pool over some of them does."""

    centre: RadiusRule
    """rule that finds the centre"""
    factors: tuple[float, ...] = (0.5, 0.7, 1.0, 1.4)
    """factors that the centre is multiplied by, one radius each"""

    def __post_init__(self):
        check_radii(self.factors, 1, "factors")

    def __call__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Prompts,
        generator: torch.Generator,
        *,
        progress: Progress = iter,
    ) -> RadiusChoice:
        """The centre times every factor, in ascending order."""
        choice = self.centre(model, tokenizer, prompts, generator, progress=progress)
        # A set: where the rule gives several centres, two products may be the same radius.
        radii = sorted({radius * factor for radius in choice.radii for factor in self.factors})
        return replace(choice, radii=tuple(radii), rule=f"several, centre: {choice.rule}")
