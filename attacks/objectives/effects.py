"""The effect of a steering vector, and of a trigger, on the residual stream: what the vector objectives compare.

An effect is the change of the residual at the last prompt token, `n d_model` for n prompts, against the same prompt
with an empty slot. `wanted_effect` measures that of the first of some vectors; `mean_over_layers` measures those of
candidates and compares them with it, layer by layer. Effects belong to the prompts of the engine that measured them.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from attacks.discovery.goal import Goal
from attacks.scoring.engine import Engine
from vectors.prompts import Prompts
from vectors.residual import read
from vectors.steering import SteeringVectors

Residuals = dict[int, Float[Tensor, "n d_model"]]
"""Per layer, a residual or a change of it at the last token of each prompt."""


def layer_before_last(engine: Engine) -> int:
    """Where effects are compared unless an attack says otherwise: the layer before the last."""
    return max(1, engine.layers - 1)


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


def vectors_of(goal: Goal) -> SteeringVectors:
    """The goal's vector; raises ValueError where the attack did not learn one."""
    if goal.vectors is None:
        raise ValueError(
            f"the objective imitates a vector that elicits {goal.behaviour!r}, and there is none; give the attack "
            "`supervised=Supervised()`, or another objective"
        )
    return goal.vectors


@torch.no_grad()
def empty_slot(engine: Engine, layers: Sequence[int]) -> Residuals:
    """Residuals at the last prompt token with nothing in the slot.

    One plain forward pass without the engine's cache, because a template may have no token behind the slot.
    """
    prompts = Prompts.from_ids(engine.problem.filled([]), device=engine.device)
    inputs = {"input_ids": prompts.input_ids, "attention_mask": prompts.attention_mask}
    # Prompts are padded on the left, so the last column is the last token of every one of them.
    hidden = read(engine.model, layers=layers, position=slice(-1, None), **inputs)
    return {layer: hidden[layer][:, -1] for layer in layers}


def wanted_effect(
    engine: Engine, vectors: SteeringVectors, layers: Sequence[int], weights: Mapping[int, float] | None = None
) -> tuple[Residuals, Residuals]:
    """(residuals with an empty slot, the change that the first of `vectors` makes to them).

    Raises:
        ValueError: vectors of another model, layers before theirs or beyond the model, weights that are not positive
            or of other layers.
    """
    check_vectors(engine, vectors, layers)
    if weights and (min(weights.values()) <= 0 or not set(weights) <= set(layers)):
        raise ValueError(f"weights are {weights}; give positive ones of the layers {list(layers)} only")
    # Differences of half-precision residuals would lose most of their bits.
    clean = {layer: hidden.float() for layer, hidden in empty_slot(engine, layers).items()}
    # The very same prompts once more while the vector is added at its layer: all change is due to the vector.
    with vectors[:1].apply(engine.model):
        steered = empty_slot(engine, layers)
    return clean, {layer: steered[layer].float() - clean[layer] for layer in layers}


def mean_over_layers(
    loss: Callable[[Tensor, Tensor], Tensor],
    engine: Engine,
    candidates: Tensor,
    *,
    clean: Residuals,
    delta: Residuals,
    weights: Mapping[int, float],
) -> Float[Tensor, "c"]:
    """Weighted mean over layers of `loss(effect, wanted effect)`, mean over prompts.

    Args:
        loss: compares effects `c n d_model` of the candidates with the wanted ones `n d_model`; returns `c n`.
        engine: runs the candidates.
        candidates: ids `c trigger` or one-hot rows `c trigger vocab`.
        clean: residuals with an empty slot.
        delta: wanted effects.
        weights: per layer; 1 where none is given.
    """
    layers = list(delta)
    # Per layer `c n d_model`; `clean` and `delta`, `n d_model`, are broadcast over the candidates.
    hidden = engine.residuals(candidates, layers)
    weight = {layer: weights.get(layer, 1.0) for layer in layers}
    losses = [weight[layer] * loss(hidden[layer].float() - clean[layer], delta[layer]).mean(1) for layer in layers]
    return torch.stack(losses).sum(0) / sum(weight.values())
