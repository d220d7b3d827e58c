"""A goal: the behaviour that a search looks for the trigger of, with a steering vector where the attack needs one.

Discovery makes goals with vectors; a behaviour that the user gives becomes a goal without one.
"""

from dataclasses import dataclass

from vectors.steering import SteeringVectors


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """A behaviour to bring about, given by the user or discovered."""

    behaviour: str
    """The opening of the replies that show the behaviour."""
    target_ids: tuple[int, ...]
    """The same as token ids: what a logit target asks for, and what success is measured by."""
    vectors: SteeringVectors | None = None
    """One vector that elicits the behaviour; None where the attack needs none."""
    agreement: float = 1.0
    """Share of held-out prompts, in [0, 1], that show the behaviour under the vector."""
    surprise: float | None = None
    """Nats of the behaviour under the unsteered model; None where the behaviour was given."""
    score: float = 1.0
    """How much the behaviour looks planted, in [0, 1] (`vectors.analysis.behaviours`); 1 where it was given."""
