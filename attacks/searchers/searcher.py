"""What a searcher is: a callable that looks for triggers of low loss and returns those that it found.

It fills the slot of `engine.problem`, a fixed number of tokens, and minimises `objective(engine, candidates)`: ids `c
trigger` come in, a loss per candidate, `c`, goes out. Every searcher is one file of this folder with one frozen
dataclass, whose fields are its settings. To add one, write such a file and name the searcher in a dict of attacks (see
`examples/`).
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import torch

from attacks.scoring.budget import Budget
from attacks.scoring.engine import Engine, Objective


class Found(NamedTuple):
    """A trigger and its loss on the search prompts."""

    trigger_ids: tuple[int, ...]
    loss: float


OnBest = Callable[[Found], bool | None]
"""Called with each improvement as soon as it is found; the search ends when it returns true."""


@runtime_checkable
class Searcher(Protocol):
    """Searches the slot of the engine's problem."""

    def __call__(
        self,
        engine: Engine,
        objective: Objective,
        generator: torch.Generator,
        budget: Budget | None = None,
        on_best: OnBest | None = None,
    ) -> list[Found]:
        """Triggers that re-tokenise, best first.

        Args:
            engine: runs the candidates; its problem holds the prompts, the slot and the permitted tokens.
            objective: the loss to be lowered.
            generator: draws everything random, on the CPU.
            budget: the search ends once it is spent, and books on it what the engine executes; None: no limit.
            on_best: called with every improvement.
        """
        ...
