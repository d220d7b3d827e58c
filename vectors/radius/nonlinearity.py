"""The radius at which a slice of the model is half-way from linear (Mack & Turner 2024, deep causal transcoding).

The rule draws random unit vectors v, computes their exact linear effect R J v on the target layer once, compares it at
each tried R with the actual effect delta(R v), and bisects R until the relative difference is the one wanted.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vectors.checks import check_layers, check_positive
from vectors.methods.controls import random_directions
from vectors.methods.jacobian import last, push
from vectors.methods.unsupervised import steered_source
from vectors.prompts import Prompts
from vectors.radius.rule import Progress, RadiusChoice
from vectors.residual import cache_source, mean_norm, run_slice

EVALUATIONS = 40
"""Radii that bracketing and bisection may try; the search raises an error after that many"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Nonlinearity:
    """The radius R at which the slice between two layers is half-way from linear (Mack & Turner 2024).

    Solves sqrt( mean_v norm(delta(R v) - R J v)^2 / norm(R J v)^2 ) = target over random unit vectors v added at every
    position; norms run over prompts, last tokens and width, J v is exact. R is bracketed, then bisected in log R.
    """

    source_layer: int
    """number of blocks after which the vectors are added"""
    target_layer: int
    """number of blocks after which the effect of the vectors is read"""
    target: float = 0.5
    """relative non-linearity wanted, fraction of the linear effect"""
    draws: int = 16
    """number of random directions"""
    tokens: int = 3
    """number of last prompt positions that count"""
    tolerance: float = 0.02
    """distance from the target at which a radius is accepted, fraction of the linear effect"""
    start: float = 0.5
    """radius tried first, fraction of the mean residual norm at the source layer"""
    span: tuple[float, float] = (1e-3, 1e3)
    """smallest and largest radius that may be tried, fractions of the mean residual norm"""
    batch_size: int | None = None
    """number of directions per forward pass; None: all"""

    def __post_init__(self):
        check_layers(self.source_layer, self.target_layer)
        check_positive(self, "target", "draws", "tokens", "tolerance")
        if not 0 < self.span[0] <= self.start <= self.span[1]:
            raise ValueError(f"start is {self.start} but span is {self.span}; give 0 < span[0] <= start <= span[1]")

    def __call__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Prompts,
        generator: torch.Generator,
        *,
        progress: Progress = iter,
    ) -> RadiusChoice:
        """One radius.

        Raises:
            ValueError: no radius within `span` reaches the target, as with a slice that is linear.
        """
        measure = self._prepare(model, prompts, generator)
        found: dict[float, float] = {}
        radius, low, high = self.start, None, None
        for _ in progress(range(EVALUATIONS)):
            value = measure(radius)
            found[radius] = value if math.isfinite(value) else math.inf  # the model overflows: far too large a radius
            low, high = (radius, high) if found[radius] < self.target else (low, radius)
            best = min(found, key=lambda radius: abs(found[radius] - self.target))
            # Only within a bracket: a curve that levels off just below the target never reaches it.
            if low and high and abs(found[best] - self.target) <= self.tolerance:
                tried = sorted(found)
                return RadiusChoice(
                    radii=(best,),
                    tried=tried,
                    values=[found[radius] for radius in tried],
                    quantity="relative non-linearity (fraction of the linear effect)",
                    rule="nonlinearity",
                    threshold=self.target,
                )
            # Bisection in log R inside a bracket; before there is one, steps by a factor of four.
            radius = math.sqrt(low * high) if low and high else 4 * low if low else radius / 4
            if not self.span[0] <= radius <= self.span[1]:
                break
        raise ValueError(
            f"no radius from {min(found):.3g} to {max(found):.3g} has relative non-linearity {self.target} +- "
            f"{self.tolerance}: it went from {found[min(found)]:.3g} to {found[max(found)]:.3g}; "
            f"put more layers between source_layer {self.source_layer} and target_layer {self.target_layer}, "
            f"change target or span, or raise start where 16-bit weights round small radii away"
        )

    def _prepare(
        self, model: PreTrainedModel, prompts: Prompts, generator: torch.Generator
    ) -> Callable[[float], float]:
        """Relative non-linearity as a function of the radius; what does not depend on it is computed here."""
        source = cache_source(model, prompts, self.source_layer)
        unit = mean_norm(source)
        directions = random_directions(self.draws, source.hidden.shape[-1], generator).to(prompts.device)
        parts = directions.split(self.batch_size or self.draws)
        slopes = [push(model, source, torch.zeros_like(v), v, self.target_layer, self.tokens) for v in parts]
        padding = ~last(source.mask, self.tokens).bool()[..., None]  # where slopes are 0
        with torch.no_grad():
            clean = last(run_slice(model, source, source.hidden, to=self.target_layer), self.tokens).float()

        @torch.no_grad()
        def measure(radius: float) -> float:
            ratios = []
            for v, slope in zip(parts, slopes, strict=True):
                steered = run_slice(model, source, steered_source(source, radius * unit * v), to=self.target_layer)
                delta = last(steered, self.tokens).float().unflatten(0, (len(v), -1)) - clean
                linear = radius * unit * slope  # the Jacobian is taken once, for the effect of R v is R J v
                off = (delta.masked_fill(padding, 0) - linear).square().sum(dim=(1, 2, 3))
                ratios.append(off / linear.square().sum(dim=(1, 2, 3)))
            return float(torch.cat(ratios).mean().sqrt())

        return measure
