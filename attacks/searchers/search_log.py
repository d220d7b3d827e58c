"""What every searcher keeps: its best trigger that re-tokenises, its costs, and whether it is time to stop."""

from types import TracebackType

from jaxtyping import Float, Int
from torch import Tensor

from attacks.scoring.budget import Budget
from attacks.scoring.engine import Engine, Objective
from attacks.searchers.candidates import Found, OnBest


class Record:
    """Best trigger of a search, as a context: Ctrl-C inside ends the search and keeps what was found."""

    def __init__(self, engine: Engine, budget: Budget | None, on_best: OnBest | None):
        self.engine, self.budget, self.on_best = engine, budget or Budget(), on_best
        self.found: list[Found] = []
        self._told = False

    def __enter__(self) -> "Record":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> bool:
        if kind is KeyboardInterrupt:
            self.budget.interrupt()
            return True
        return False

    @property
    def loss(self) -> float:
        """Of the best trigger so far; infinite before the first."""
        return self.found[0].loss if self.found else float("inf")

    @property
    def over(self) -> bool:
        """Whether the budget is spent, or `on_best` asked to stop."""
        return self._told or self.budget.exhausted

    def offer(self, candidates: Int[Tensor, "c trigger"], losses: Float[Tensor, "c"]) -> None:
        """Keeps the lowest of the losses whose trigger re-tokenises, if it beats the best; tells `on_best`."""
        for index in losses.argsort().tolist():
            found = Found(tuple(candidates[index].tolist()), float(losses[index]))
            if not found.loss < self.loss:
                break
            if self.engine.problem.retokenizes(list(found.trigger_ids)):
                self.found.insert(0, found)
                self._told = bool(self.on_best is not None and self.on_best(found)) or self._told
                break

    def score(self, objective: Objective, candidates: Int[Tensor, "c trigger"]) -> Float[Tensor, "c"]:
        """Losses of the candidates, the best of them offered."""
        losses = self.engine.losses(objective, candidates)
        self.offer(candidates, losses)
        return losses
