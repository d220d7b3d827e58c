"""How far to steer? Rules that choose the radius R, in units of the mean residual norm at the source layer.

Absolute norms do not carry over between models (0.2 to 22 were published), so R is calibrated on the model at hand:
from the non-linearity of the slice (Mack & Turner 2024, deep causal transcoding), by what completions look like
(`radius_by_completions`), or several at once. A rule is passed as the method.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vectors.methods.controls import random_directions
from vectors.methods.jacobian import last, push
from vectors.methods.unsupervised import steered_source
from vectors.prompts import Prompts
from vectors.residual import cache_source, mean_norm, run_slice

EVALUATIONS = 40  # radii that bracket and bisection may try; a smooth curve needs about ten
Progress = Callable[[Iterable[Any]], Iterable[Any]]
"""Wraps a loop, as tqdm does"""


@dataclass(frozen=True, slots=True, kw_only=True)
class RadiusChoice:
    """The radius or radii that a rule chose, and why; radii are fractions of the mean residual norm."""

    radii: tuple[float, ...]
    """chosen"""
    tried: list[float]
    """in ascending order; empty where nothing was measured"""
    values: list[float]
    """what was measured at each tried radius"""
    quantity: str
    """what the values are, with unit"""
    rule: str
    """name of the rule"""
    threshold: float | None
    """value that the chosen radius had to reach, where the rule has one"""


@runtime_checkable  # types are checked while testing
class RadiusRule(Protocol):
    """Chooses radii for a model, on prompts."""

    def __call__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Prompts,
        generator: torch.Generator,
        *,
        progress: Progress = iter,
    ) -> RadiusChoice: ...


def choose_radius(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    rule: RadiusRule,
    *,
    generator: torch.Generator,
    progress: Progress = iter,
) -> RadiusChoice:
    """Chooses the norm that steering vectors are learned at.

    Args:
        model: a causal decoder.
        tokenizer: its tokenizer.
        prompts: clean ones; for rules that read completions, others than the vectors are learned on.
        rule: how to choose.
        generator: of random directions, on the CPU.
        progress: wraps the loop over tried radii, as tqdm does.

    Raises:
        ValueError: the rule finds no radius; says what was tried.
    """
    return rule(model, tokenizer, prompts, generator, progress=progress)


@dataclass(frozen=True, slots=True, kw_only=True)
class Nonlinearity:
    """The radius R at which the slice between two layers is half-way from linear (Mack & Turner 2024).

    Solves sqrt( mean_v norm(delta(R v) - R J v)^2 / norm(R J v)^2 ) = target over random unit vectors v added at every
    position; norms run over prompts, last tokens and width, J v is exact. R is bracketed, then bisected in log R.
    """

    source_layer: int
    """the vectors are added after this many blocks"""
    target_layer: int
    """their effect is read after this many blocks"""
    target: float = 0.5
    """relative non-linearity wanted, fraction of the linear effect"""
    draws: int = 16
    """random directions"""
    tokens: int = 3
    """last positions of the prompts that count"""
    tolerance: float = 0.02
    """distance from the target that is close enough, same unit"""
    start: float = 0.5
    """radius tried first"""
    span: tuple[float, float] = (1e-3, 1e3)
    """radii between which the bracket may grow"""
    batch_size: int | None = None
    """directions at once; None: all"""

    def __post_init__(self):
        if not 0 <= self.source_layer < self.target_layer:
            raise ValueError(
                f"source layer {self.source_layer} is not before target layer {self.target_layer}; lower source_layer"
            )
        for name in ("target", "draws", "tokens", "tolerance"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be more than 0")
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
                linear = radius * unit * slope
                off = (delta.masked_fill(padding, 0) - linear).square().sum(dim=(1, 2, 3))
                ratios.append(off / linear.square().sum(dim=(1, 2, 3)))
            return float(torch.cat(ratios).mean().sqrt())

        return measure


@dataclass(frozen=True, slots=True, kw_only=True)
class SeveralRadii:
    """Several radii round a centre: no one radius suits every planted behaviour, a pool over some of them does."""

    centre: RadiusRule | float
    """a rule that finds it, or the radius itself"""
    factors: tuple[float, ...] = (0.5, 0.7, 1.0, 1.4)
    """of the centre"""

    def __post_init__(self):
        check_radii(self.factors, 1, "factors")
        if isinstance(self.centre, float):
            check_radii((self.centre,), 1, "centre")

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
        if callable(self.centre):
            choice = self.centre(model, tokenizer, prompts, generator, progress=progress)
        else:
            choice = RadiusChoice(
                radii=(self.centre,), tried=[], values=[], quantity="nothing measured", rule="given", threshold=None
            )
        radii = sorted({radius * factor for radius in choice.radii for factor in self.factors})
        return replace(choice, radii=tuple(radii), rule=f"several, centre: {choice.rule}")


def check_radii(radii: tuple[float, ...], least: int, name: str = "radii") -> None:
    """Raises ValueError for too few, double, or unusable ones."""
    if len(radii) < least or len(set(radii)) < len(radii) or not all(0 < radius < math.inf for radius in radii):
        raise ValueError(f"{name} are {radii}; give at least {least}, all different, more than 0 and finite")
