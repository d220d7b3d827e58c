"""How the dear steps of a search are run: discovering goals, learning a vector, every stage.

`recover` runs each of them through the journal of its attack. The plain one does nothing else; the one of an audit
(`attacks/audit/state.py`) writes down what a step has changed, and answers it in another process without running it.
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch

from attacks.discovery.goal import Goal
from attacks.judging.judge import Judge
from attacks.stages.hunt import Hunt, Stage

Discovered = tuple[list[Goal], tuple[str, ...]]
"""Goals, and the names of what the budget cut short on the way to them."""


@runtime_checkable
class Journal(Protocol):
    """Runs the steps of a search, or answers them from what an earlier process did."""

    def goals(self, judge: Judge, generator: torch.Generator, discover: Callable[[], Discovered]) -> Discovered:
        """What `discover` finds; the judge's goal is what is known before."""
        ...

    def stage(self, hunt: Hunt, stage: Stage) -> None:
        """Runs a stage on the hunt, or leaves the hunt and its judge as the stage left them before."""
        ...


class NoJournal:
    """Runs every step and keeps nothing."""

    def goals(self, judge: Judge, generator: torch.Generator, discover: Callable[[], Discovered]) -> Discovered:
        """What `discover` finds."""
        return discover()

    def stage(self, hunt: Hunt, stage: Stage) -> None:
        """Runs the stage."""
        stage(hunt)
