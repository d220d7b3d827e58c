"""What every searcher keeps while it runs: the triggers that it found, what they cost, and whether it is time to stop.

A searcher opens a `SearchLog` as a context, gives it each batch of candidates with their losses, and ends once `over`
is true. The log keeps those that beat the best so far and re-tokenise, and calls `on_best` with each.
"""

from bisect import bisect_left
from types import TracebackType

from jaxtyping import Float, Int
from torch import Tensor

from attacks.scoring.budget import Budget
from attacks.scoring.engine import Engine, Objective
from attacks.searchers.searcher import Found, OnBest


class SearchLog:
    """Finds and costs of one search, as a context: Ctrl-C inside it ends the search and keeps what was found."""

    def __init__(self, engine: Engine, budget: Budget | None, on_best: OnBest | None):
        self.engine, self.budget, self.on_best = engine, budget or Budget(), on_best
        self.found: list[Found] = []
        """Triggers kept so far, best first."""
        self._told_to_stop = False

    def __enter__(self) -> "SearchLog":
        return self

    # Returning true swallows the Ctrl-C: the searcher then returns what it has found, and the budget says why it ended.
    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> bool:
        if kind is KeyboardInterrupt:
            self.budget.interrupt()
            return True
        return False

    @property
    def loss(self) -> float:
        """Loss of the best trigger so far; infinite before the first."""
        return self.found[0].loss if self.found else float("inf")

    @property
    def over(self) -> bool:
        """Whether the budget is spent, or `on_best` asked to stop."""
        return self._told_to_stop or self.budget.exhausted

    def keep(self, found: Found) -> None:
        """Keeps a trigger that re-tokenises and calls `on_best` with it, whether or not it is the best so far."""
        if found not in self.found:
            self.found.insert(bisect_left(self.found, found.loss, key=lambda other: other.loss), found)
        if self.on_best is not None and self.on_best(found):
            self._told_to_stop = True

    def offer(self, candidates: Int[Tensor, "c trigger"], losses: Float[Tensor, "c"]) -> None:
        """Keeps the candidate of lowest loss that re-tokenises, if it beats the best so far."""
        for index in losses.argsort().tolist():
            found = Found(tuple(candidates[index].tolist()), float(losses[index]))
            # Not `>=`, so that a loss of NaN ends the loop too. Losses ascend: no later candidate can be better.
            if not found.loss < self.loss:
                break
            if self.engine.problem.retokenizes(found.trigger_ids):
                self.keep(found)
                break

    def score(self, objective: Objective, candidates: Int[Tensor, "c trigger"]) -> Float[Tensor, "c"]:
        """Losses of the candidates, the best of which is offered."""
        losses = self.engine.losses(objective, candidates)
        self.offer(candidates, losses)
        return losses
