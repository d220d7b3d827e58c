"""Hybrid: the weighted sum of two objectives, such as target likelihood and the effect of a steering vector; ours.

The losses `c` of c candidates under either objective are added as they are, although one may be in nats and the other a
cosine in [-1, 1]: the weight has to make up for their units.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from attacks.discovery.goal import Goal
from attacks.objectives.delta_cosine import DeltaCosine
from attacks.objectives.target_nll import TargetNLL
from attacks.scoring.engine import Engine, Objective


@dataclass(frozen=True, slots=True, kw_only=True)
class Hybrid:
    """(1 - weight) * a + weight * b."""

    a: Objective
    """First objective."""
    b: Objective
    """Second objective."""
    weight: float = 0.5
    """Weight of the second objective, in [0, 1]; the first gets the rest."""

    def __post_init__(self):
        if not 0 <= self.weight <= 1:
            raise ValueError(f"weight is {self.weight}; it must lie in [0, 1]")

    @classmethod
    def from_goal(cls, engine: Engine, goal: Goal, *, weight: float = 0.5) -> "Hybrid":
        """Target likelihood, and the effect of the same goal's vector."""
        return cls(a=TargetNLL.from_goal(engine, goal), b=DeltaCosine.from_goal(engine, goal), weight=weight)

    def __call__(self, engine: Engine, candidates: Tensor) -> Float[Tensor, "c"]:
        return (1 - self.weight) * self.a(engine, candidates) + self.weight * self.b(engine, candidates)
