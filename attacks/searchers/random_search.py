"""Random search: uniform triggers, or a (1+lambda) local search round the best (no paper; the floor of every searcher).

Uniform draws come to the optimum of any slot in the end; the local search does not promise that: it never leaves a
trigger that no redraw of `mutate` positions improves.
"""

from dataclasses import dataclass

import torch

from attacks.scoring.budget import Budget
from attacks.scoring.engine import Engine, Objective
from attacks.searchers.candidates import check_counts, permitted_in_slot, random_triggers
from attacks.searchers.search_log import SearchLog
from attacks.searchers.searcher import Found, OnBest


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomSearch:
    """Scores random triggers; with `mutate`, variants of the best one."""

    steps: int = 250
    """Batches of triggers that are scored, in all."""
    search_width: int = 512
    """Triggers scored per batch (lambda)."""
    mutate: int = 0
    """Positions of the best trigger that are drawn anew; 0: every trigger is drawn anew as a whole."""

    def __post_init__(self):
        check_counts(self, "steps", "search_width")
        if self.mutate < 0:
            raise ValueError(f"mutate is {self.mutate}; it must be at least 0")

    def __call__(
        self,
        engine: Engine,
        objective: Objective,
        generator: torch.Generator,
        budget: Budget | None = None,
        on_best: OnBest | None = None,
    ) -> list[Found]:
        """Every improvement that re-tokenises, best first; an interrupt keeps what was found.

        Raises:
            ValueError: an empty slot, or more positions drawn again than there are.
        """
        problem = engine.problem
        permitted = permitted_in_slot(problem)
        if self.mutate > len(permitted):
            raise ValueError(f"mutate is {self.mutate} but the slot has {len(permitted)} tokens; lower mutate")
        with SearchLog(engine, budget, on_best) as log:
            for _ in range(self.steps):
                if log.over:
                    break
                # `search_width trigger`, uniform over the permitted tokens.
                candidates = random_triggers(permitted, self.search_width, generator)
                if self.mutate and log.found:
                    parent = torch.tensor(log.found[0].trigger_ids)
                    # Each row of the argsort is a random permutation: exactly `mutate` entries lie below `mutate`.
                    drawn = torch.rand(candidates.shape, generator=generator).argsort(-1) < self.mutate
                    candidates = torch.where(drawn, candidates, parent)
                log.score(objective, candidates)
        return log.found
