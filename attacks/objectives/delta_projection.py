"""Delta projection: a trigger should move the residual stream as far as a steering vector does, and that way; ours.

Like delta cosine, but the length of the change counts too: effects `c n d_model` of c candidates on n prompts are
projected onto the vector's own, `n d_model`, and measured in units of its length.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from attacks.discovery.goal import Goal
from attacks.objectives.effects import Residuals, layer_before_last, mean_over_layers, vectors_of, wanted_effect
from attacks.scoring.engine import Engine
from vectors.steering import SteeringVectors


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaProjection:
    """Negative projection of the candidate's effect onto the wanted one: 0 is no effect, -1 as far as wanted.

    It has no lower bound, and what a candidate does in other directions costs nothing.
    """

    delta: Residuals
    """Per layer, the wanted change of the residual; its length is the unit of the loss."""
    clean: Residuals
    """Per layer, the residual with an empty slot."""
    weights: dict[int, float] = field(default_factory=dict)
    """Weight of each layer in the mean; 1 where none is given."""

    @classmethod
    def from_vectors(
        cls, engine: Engine, vectors: SteeringVectors, layers: Sequence[int], weights: dict[int, float] | None = None
    ) -> "DeltaProjection":
        """Imitates the effect of the first of `vectors` on the engine's prompts.

        Raises:
            ValueError: as for `wanted_effect`.
        """
        clean, delta = wanted_effect(engine, vectors, layers, weights)
        return cls(delta=delta, clean=clean, weights=weights or {})

    @classmethod
    def from_goal(cls, engine: Engine, goal: Goal) -> "DeltaProjection":
        """Imitates the goal's vector at the layer before the last."""
        vectors = vectors_of(goal)
        return cls.from_vectors(engine, vectors, [layer_before_last(engine)])

    def __call__(self, engine: Engine, candidates: Tensor) -> Float[Tensor, "c"]:
        return mean_over_layers(
            # Projection onto the unit vector divided by the length of the wanted effect: its square in all.
            lambda got, wanted: -(got * wanted).sum(-1) / _square(wanted),
            engine, candidates, clean=self.clean, delta=self.delta, weights=self.weights,
        )  # fmt: skip


def _square(wanted: Float[Tensor, "n d_model"]) -> Float[Tensor, "n"]:
    """Squared length, bounded below so that a vector without effect gives 0 and not NaN."""
    return wanted.square().sum(-1).clamp(min=1e-12)
