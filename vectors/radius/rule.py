"""What a rule for the radius R of steering vectors takes and returns.

R is the norm of the vectors as a fraction of the mean residual norm at the source layer. Norms in the residual's own
units do not carry over between models (0.2 to 22 were published), so a rule chooses R on the model at hand: from how
far the slice between two layers is from linear (`nonlinearity`), from completions under vectors learned at several
radii (`completions`), or by spreading several radii round a centre (`several`).
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vectors.prompts import Prompts

Progress = Callable[[Iterable[Any]], Iterable[Any]]
"""Wraps the loop over tried radii, as tqdm does"""


@dataclass(frozen=True, slots=True, kw_only=True)
class RadiusChoice:
    """The radius or radii that a rule chose, and why; radii are fractions of the mean residual norm."""

    radii: tuple[float, ...]
    """chosen radii"""
    tried: list[float]
    """radii that were tried, in ascending order; empty where nothing was measured"""
    values: list[float]
    """what was measured at each tried radius"""
    quantity: str
    """what the values measure, with their unit"""
    rule: str
    """name of the rule that chose"""
    threshold: float | None
    """value that the chosen radius had to reach; None where the rule has none"""


@runtime_checkable  # types are checked while testing
class RadiusRule(Protocol):
    """Chooses the norm that steering vectors are learned at."""

    def __call__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Prompts,
        generator: torch.Generator,
        *,
        progress: Progress = iter,
    ) -> RadiusChoice:
        """The radius or radii for vectors of this model.

        Args:
            model: a causal decoder.
            tokenizer: its tokenizer.
            prompts: clean ones; for rules that read completions, others than the vectors are learned on.
            generator: draws random directions; on the CPU.
            progress: wraps the loop over tried radii, as tqdm does.

        Raises:
            ValueError: the rule finds no radius; says what was tried.
        """
        ...


def check_radii(radii: tuple[float, ...], least: int, name: str = "radii") -> None:
    """Raises ValueError for too few, double, or unusable ones."""
    if len(radii) < least or len(set(radii)) < len(radii) or not all(0 < radius < math.inf for radius in radii):
        raise ValueError(f"{name} are {radii}; give at least {least}, all different, more than 0 and finite")
