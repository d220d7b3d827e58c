"""What a good trigger does: target likelihood, the effect of a steering vector, the steered model's output.

Each objective is a callable on candidates, differentiable through one-hot rows, lower is better. Effects are changes of
the residual stream at the last prompt token against the same prompt with an empty slot. An objective belongs to the
prompts that it was made on. Of several vectors the first is imitated.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from attacks.scoring.engine import Engine, Objective
from vectors.prompts import Prompts
from vectors.residual import read, unembed
from vectors.steering import SteeringVectors


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetNLL:
    """Negative log-likelihood of the target, nats per token (GCG, Zou et al. 2023, eq. 3), mean over prompts.

    The mellowmax of a prompt's tokens, log(mean(exp(alpha x))) / alpha (Asadi & Littman 2017, arXiv:1612.05628), lies
    between their mean (small alpha) and their maximum (large alpha), so that the least likely token counts most.
    nanoGCG applies the same operator to the negative logits of the target instead, which lack the normaliser and
    therefore also fall when the logits of all tokens rise.
    """

    target_ids: Sequence[int]
    """the behaviour as tokens"""
    reduction: Literal["mean", "mellowmax"] = "mean"
    """over the tokens of the target"""
    alpha: float = 1.0
    """sharpness of the mellowmax, per nat"""

    def __post_init__(self):
        if self.reduction not in ("mean", "mellowmax"):
            raise ValueError(f"reduction is {self.reduction!r}; use 'mean' or 'mellowmax'")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha is {self.alpha}; it must be positive and finite")

    def __call__(self, engine: Engine, candidates: Tensor) -> Float[Tensor, "c"]:
        logprobs = engine.target_logits(candidates, self.target_ids).float().log_softmax(-1)
        target = torch.tensor(list(self.target_ids), device=logprobs.device)
        nll = -logprobs.gather(-1, target.expand(logprobs.shape[:-1])[..., None])[..., 0]
        if self.reduction == "mean":
            return nll.mean(dim=(1, 2))
        soft = (self.alpha * nll).logsumexp(-1) - math.log(len(target))
        return soft.mean(1) / self.alpha


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaCosine:
    """Negative cosine between the candidate's effect and the wanted effect, in [-1, 1]."""

    delta: dict[int, Float[Tensor, "n d_model"]]
    """per layer, the wanted change"""
    clean: dict[int, Float[Tensor, "n d_model"]]
    """per layer, the residual with an empty slot"""
    weights: dict[int, float] = field(default_factory=dict)
    """per layer; 1 where none is given"""

    def __call__(self, engine: Engine, candidates: Tensor) -> Float[Tensor, "c"]:
        return _over_layers(self, engine, candidates, lambda got, wanted: -torch.cosine_similarity(got, wanted, dim=-1))


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaProjection:
    """Negative projection of the candidate's effect onto the wanted one: 0 is no effect, -1 as far as wanted.

    It has no lower bound, and what a candidate does in other directions costs nothing.
    """

    delta: dict[int, Float[Tensor, "n d_model"]]
    """per layer, the wanted change, also the unit of length"""
    clean: dict[int, Float[Tensor, "n d_model"]]
    """per layer, the residual with an empty slot"""
    weights: dict[int, float] = field(default_factory=dict)
    """per layer; 1 where none is given"""

    def __call__(self, engine: Engine, candidates: Tensor) -> Float[Tensor, "c"]:
        return _over_layers(self, engine, candidates, lambda got, wanted: -(got * wanted).sum(-1) / _square(wanted))


@dataclass(frozen=True, slots=True, kw_only=True)
class SteeredKL:
    """KL(steered || candidate) of the next-token distribution read at `layer`, nats; needs no behaviour text."""

    steered_logprobs: Float[Tensor, "n vocab"]
    """of the steered model on the prompts with an empty slot"""
    layer: int
    """blocks before the read-out; the number of layers is the true output"""

    def __call__(self, engine: Engine, candidates: Tensor) -> Float[Tensor, "c"]:
        logprobs = engine.logits(candidates, self.layer).float().log_softmax(-1)
        gap = self.steered_logprobs.exp() * (self.steered_logprobs - logprobs)
        return gap.sum(-1).mean(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hybrid:
    """Weighted sum of two objectives."""

    a: Objective
    b: Objective
    weight: float = 0.5
    """of `b`, in [0, 1]"""

    def __post_init__(self):
        if not 0 <= self.weight <= 1:
            raise ValueError(f"weight is {self.weight}; it must lie in [0, 1]")

    def __call__(self, engine: Engine, candidates: Tensor) -> Float[Tensor, "c"]:
        return (1 - self.weight) * self.a(engine, candidates) + self.weight * self.b(engine, candidates)


def delta_cosine_from(
    engine: Engine, vectors: SteeringVectors, layers: Sequence[int], weights: dict[int, float] | None = None
) -> DeltaCosine:
    """The effect of the first of `vectors` on the engine's prompts, as the thing to imitate.

    Raises:
        ValueError: vectors of another model, layers before theirs or beyond the model, weights that are not positive
            or of other layers.
    """
    clean, delta = _wanted(engine, vectors, layers, weights)
    return DeltaCosine(delta=delta, clean=clean, weights=weights or {})


def delta_projection_from(
    engine: Engine, vectors: SteeringVectors, layers: Sequence[int], weights: dict[int, float] | None = None
) -> DeltaProjection:
    """The effect of the first of `vectors` on the engine's prompts, as the distance to go.

    Raises:
        ValueError: as for `delta_cosine_from`.
    """
    clean, delta = _wanted(engine, vectors, layers, weights)
    return DeltaProjection(delta=delta, clean=clean, weights=weights or {})


def steered_kl_from(engine: Engine, vectors: SteeringVectors, layer: int) -> SteeredKL:
    """The next-token distribution under the first of `vectors`, as the thing to imitate.

    Raises:
        ValueError: vectors of another model, a layer before theirs or beyond the model.
    """
    check_vectors(engine, vectors, [layer])
    with vectors[:1].apply(engine.model):
        hidden = empty_slot(engine, [layer])[layer]
    with torch.no_grad():
        return SteeredKL(steered_logprobs=unembed(engine.model, hidden).float().log_softmax(-1), layer=layer)


def _over_layers(
    goal: DeltaCosine | DeltaProjection,
    engine: Engine,
    candidates: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
) -> Float[Tensor, "c"]:
    """Weighted mean over layers of a loss of (effect, wanted effect), mean over prompts."""
    layers = list(goal.delta)
    hidden = engine.residuals(candidates, layers)
    weights = {layer: goal.weights.get(layer, 1.0) for layer in layers}
    losses = [
        weights[layer] * loss(hidden[layer].float() - goal.clean[layer], goal.delta[layer]).mean(1) for layer in layers
    ]
    return torch.stack(losses).sum(0) / sum(weights.values())


def _square(wanted: Float[Tensor, "n d_model"]) -> Float[Tensor, "n"]:
    """Squared length; a vector without effect gives no direction, not NaN."""
    return wanted.square().sum(-1).clamp(min=1e-12)


def check_vectors(engine: Engine, vectors: SteeringVectors, layers: Sequence[int]) -> None:
    """Raises ValueError unless there are vectors of this model, and layers at which they have an effect."""
    if len(vectors) == 0:
        raise ValueError("got 0 steering vectors; give at least one")
    vectors.check(engine.model)
    first, last = vectors.source_layer, engine.layers
    if not layers or not all(first <= layer <= last for layer in layers):
        raise ValueError(
            f"got layers {list(layers)} but the vectors act from layer {first} on and the model has {last}; "
            f"give {first} to {last}"
        )


def _wanted(
    engine: Engine, vectors: SteeringVectors, layers: Sequence[int], weights: dict[int, float] | None
) -> tuple[dict[int, Float[Tensor, "n d_model"]], dict[int, Float[Tensor, "n d_model"]]]:
    """(clean residual, the first vector's effect on it)."""
    check_vectors(engine, vectors, layers)
    if weights and (min(weights.values()) <= 0 or not set(weights) <= set(layers)):
        raise ValueError(f"weights are {weights}; give positive ones of the layers {list(layers)} only")
    clean = {layer: hidden.float() for layer, hidden in empty_slot(engine, layers).items()}
    with vectors[:1].apply(engine.model):
        steered = empty_slot(engine, layers)
    return clean, {layer: steered[layer].float() - clean[layer] for layer in layers}


@torch.no_grad()
def empty_slot(engine: Engine, layers: Sequence[int]) -> dict[int, Float[Tensor, "n d_model"]]:
    """Residuals at the last prompt token, in one plain forward pass: templates may have no token behind the slot."""
    prompts = Prompts.from_ids(engine.problem.filled([]), device=engine.device)
    inputs = {"input_ids": prompts.input_ids, "attention_mask": prompts.attention_mask}
    hidden = read(engine.model, layers=layers, position=slice(-1, None), **inputs)
    return {layer: hidden[layer][:, -1] for layer in layers}
