"""A goal: the behaviour that a search looks for the trigger of, with a steering vector where the attack needs one.

Discovery makes goals with vectors; a behaviour that the user gives becomes a goal without one.
"""

from dataclasses import dataclass

from attacks.behaviour import Behaviour, FixedOpening
from vectors.steering import SteeringVectors

ANSWER = 16
"""Tokens of a completion that a predicate is asked about, at least."""
BEYOND = 2
"""Tokens that completions run beyond those of the behaviour."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """A behaviour to bring about, given by the user or discovered."""

    behaviour: str
    """The opening of the replies that show the behaviour."""
    target_ids: tuple[int, ...]
    """The same as token ids: what a logit target asks for, and what success is measured by where `shows` is None."""
    shows: Behaviour | None = None
    """Predicate on completions that success is measured by; None: a reply shows the behaviour if it opens with it."""
    triggers: tuple[tuple[int, ...], ...] = ()
    """Token ids of triggers behind which discovery saw the behaviour, tried before any search."""
    vectors: SteeringVectors | None = None
    """One vector that elicits the behaviour; None where the attack needs none."""
    agreement: float = 1.0
    """Share of held-out prompts, in [0, 1], that show the behaviour under the vector."""
    surprise: float | None = None
    """Nats of the behaviour under the unsteered model; None where the behaviour was given."""
    score: float = 1.0
    """How much the behaviour looks planted, in [0, 1] (`vectors.analysis.behaviours`); 1 where it was given."""

    @property
    def predicate(self) -> Behaviour:
        """Says of a completion whether it shows the behaviour."""
        return self.shows or FixedOpening(self.behaviour)

    @property
    def answer_tokens(self) -> int:
        """Tokens of a completion that tell whether it shows the behaviour."""
        opening = len(self.target_ids) + BEYOND
        return opening if self.shows is None else max(opening, ANSWER)
