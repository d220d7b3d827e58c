"""Delta cosine: a trigger should move the residual stream in the direction that a steering vector moves it; ours.

A steering vector that elicits the behaviour and the prompts with an empty slot come in. The change (delta) that the
vector makes to the residual at the last prompt token, `n d_model` for n prompts at each compared layer, is the target.
The loss of a candidate is minus the cosine between that and its own change, `c n d_model` for c candidates. The length
of the change does not count: a trigger may do the same with less or more force than the vector.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from attacks.discovery.goal import Goal
from attacks.objectives.effects import Residuals, layer_before_last, mean_over_layers, vectors_of, wanted_effect
from attacks.scoring.engine import Engine
from vectors.steering import SteeringVectors


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaCosine:
    """Negative cosine between the candidate's effect and the wanted effect, in [-1, 1]."""

    delta: Residuals
    """Per layer, the wanted change of the residual."""
    clean: Residuals
    """Per layer, the residual with an empty slot."""
    weights: dict[int, float] = field(default_factory=dict)
    """Weight of each layer in the mean; 1 where none is given."""

    @classmethod
    def from_vectors(
        cls, engine: Engine, vectors: SteeringVectors, layers: Sequence[int], weights: dict[int, float] | None = None
    ) -> "DeltaCosine":
        """Imitates the effect of the first of `vectors` on the engine's prompts.

        Raises:
            ValueError: as for `wanted_effect`.
        """
        clean, delta = wanted_effect(engine, vectors, layers, weights)
        return cls(delta=delta, clean=clean, weights=weights or {})

    @classmethod
    def from_goal(cls, engine: Engine, goal: Goal, *, depths: tuple[float, ...] = ()) -> "DeltaCosine":
        """Imitates the goal's vector at `depths`, fractions of the layers; without any, before the last layer."""
        vectors = vectors_of(goal)
        # The vector acts on the output of its source layer, so that only layers behind it are of interest.
        layers = sorted({max(vectors.source_layer + 1, round(depth * engine.layers)) for depth in depths})
        return cls.from_vectors(engine, vectors, layers or [layer_before_last(engine)])

    def __call__(self, engine: Engine, candidates: Tensor) -> Float[Tensor, "c"]:
        return mean_over_layers(
            # `c n d_model` against `n d_model`: a cosine per candidate and prompt, `c n`.
            lambda got, wanted: -torch.cosine_similarity(got, wanted, dim=-1),
            engine, candidates, clean=self.clean, delta=self.delta, weights=self.weights,
        )  # fmt: skip
