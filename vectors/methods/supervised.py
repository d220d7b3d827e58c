"""Supervised steering vector: the smallest perturbation that makes the model answer with a known behaviour.

Larger radii elicit the behaviour too, but their effect points elsewhere than the trigger's, so the smallest is wanted.
All radii are learned in one batch on the slice behind the source layer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import sqrt
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from vectors.checks import check_layers
from vectors.generate import greedy
from vectors.methods.controls import random_directions
from vectors.methods.likelihood import IGNORED, fit_likelihood, label_nll
from vectors.prompts import Prompts
from vectors.residual import cache_source, decoder, mean_norm, steer
from vectors.steering import SteeringVectors, model_id


class _Learned(NamedTuple):
    """One radius, and what learning at it gave."""

    radius: float
    theta: Tensor
    nll: float
    rate: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisedVector:
    """Minimises the cross-entropy of the target after every prompt, at several norms at once."""

    source_layer: int
    """number of blocks after which the vector is added"""
    target_layer: int
    """number of blocks after which effects of the vector are compared later on; learning itself reads the output"""
    radii: tuple[float, ...] = (0.2, 0.3, 0.4, 0.5, 0.65, 0.8, 1.0)
    """norms to try, fractions of the mean residual norm at the source layer"""
    steps: int = 40
    """number of optimizer steps"""
    lr: float = 0.05
    """AMSGrad step size, fraction of the norm"""
    enough: float = 0.9
    """share of the prompts, in (0, 1], on which a vector must elicit the target for its radius to do"""
    bisections: int = 0
    """number of further radii, each the geometric mean of the largest that fails and the smallest that elicits"""

    def __post_init__(self):
        if not self.radii or min(self.radii) <= 0:
            raise ValueError(f"radii are {self.radii}; give at least one, all more than 0")
        check_layers(self.source_layer, self.target_layer)
        if self.bisections < 0:
            raise ValueError(f"bisections is {self.bisections}; give 0 or more")

    def __call__(
        self,
        model: PreTrainedModel,
        prompts: Prompts,
        target_ids: list[int],
        generator: torch.Generator,
        *,
        deadline: Callable[[], bool] | None = None,
    ) -> SteeringVectors:
        """One vector, at the smallest radius that elicits the target on `enough` of the prompts.

        Where none does, the one with the best likelihood, and `scores["elicits"]` says how often it does. `deadline` is
        asked before every step and ends learning once it returns true.

        Raises:
            ValueError: an empty target, or layers that the model does not have.
        """
        if not target_ids:
            raise ValueError("the target has 0 tokens; give a behaviour that the tokenizer can encode")
        target = torch.tensor(target_ids, device=prompts.device)
        fed = with_target(prompts, target[:-1])
        source = cache_source(model, fed, self.source_layer)
        # The radius is in units of the prompts alone, so that it does not depend on the target's tokens.
        unit = mean_norm(cache_source(model, prompts, self.source_layer))
        # Padding is on the left, so in every row the last positions predict the target.
        labels = torch.full_like(fed.input_ids, IGNORED)
        labels[:, -len(target) :] = target

        def learn(radii: list[float]) -> list[_Learned]:
            norms = torch.tensor([radius * unit for radius in radii], device=prompts.device)[:, None]
            start = random_directions(len(norms), decoder(model).d_model, generator)
            nll = partial(label_nll, model, source, labels)
            theta, losses = fit_likelihood(nll, start, norms, steps=self.steps, lr=self.lr, deadline=deadline)
            rates = elicits(model, prompts, self.source_layer, theta, target)
            return list(map(_Learned, radii, theta, losses.tolist(), rates.tolist()))

        best = self._smallest(learn, deadline or (lambda: False))
        return SteeringVectors(
            theta=best.theta[None],
            source_layer=self.source_layer,
            target_layer=self.target_layer,
            radius=best.radius,
            method="supervised",
            model_id=model_id(model),
            scores={"nll": [best.nll], "elicits": [best.rate]},
        )

    def _smallest(self, learn: Callable[[list[float]], list[_Learned]], over: Callable[[], bool]) -> _Learned:
        """The smallest radius that elicits: of the grid first, then by bisection below it."""
        tried = learn(sorted(self.radii))
        best = next((one for one in tried if one.rate >= self.enough), None)
        if best is None:  # none elicits often enough: the best likelihood instead
            return min(tried, key=lambda one: one.nll)
        failing = max((one.radius for one in tried if one.radius < best.radius), default=None)
        if failing is None:  # the smallest of the grid elicits: nothing bounds the search from below
            return best
        for _ in range(self.bisections):
            if over():
                break
            (middle,) = learn([sqrt(failing * best.radius)])
            if middle.rate >= self.enough:
                best = middle
            else:
                failing = middle.radius
        return best


def elicits(
    model: PreTrainedModel, prompts: Prompts, layer: int, theta: Float[Tensor, "k d"], target: Tensor
) -> Float[Tensor, "k"]:
    """Share of the prompts on which each vector's greedy decode begins with the target; one batch."""
    count = len(theta)
    rows = Prompts(input_ids=prompts.input_ids.repeat(count, 1), attention_mask=prompts.attention_mask.repeat(count, 1))
    with steer(model, layer, theta.repeat_interleave(len(prompts), dim=0)):
        decoded = greedy(model, rows, len(target))
    return (decoded == target).all(-1).float().unflatten(0, (count, -1)).mean(-1)


def with_target(prompts: Prompts, target: Tensor) -> Prompts:
    """Prompts with the target's tokens appended, for teacher forcing."""
    rows = target.expand(len(prompts), -1)
    return Prompts(
        input_ids=torch.cat([prompts.input_ids, rows], dim=1),
        attention_mask=torch.cat([prompts.attention_mask, torch.ones_like(rows)], dim=1),
    )
