"""Universal adversarial triggers (Wallace, Feng, Kandpal, Gardner, Singh 2019, arXiv:1908.07125, section 2) by HotFlip.

The step is the first-order one of HotFlip (Ebrahimi, Rao, Lowd, Dou 2018, arXiv:1712.06751): the tokens whose embedding
has the lowest dot product with the gradient are tried exactly, position by position, with a beam. One gradient serves a
whole sweep, as in the paper.

Departures: a trigger begins with random tokens, not with "the the the", and anew when a sweep improves nothing, since
local minima differ by start; every sweep sees all prompts, not a minibatch; a beam prefers triggers that re-tokenise.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from attacks.scoring.budget import Budget
from attacks.scoring.engine import Engine, Objective
from attacks.searchers.candidates import check_counts, fittest, most_promising, permitted_in_slot, random_triggers
from attacks.searchers.search_log import SearchLog
from attacks.searchers.searcher import Found, OnBest


@dataclass(frozen=True, slots=True, kw_only=True)
class HotFlip:
    """Sweeps over the positions, trying the tokens that the gradient promises most of; restarts at local minima."""

    steps: int = 250
    """Sweeps over all positions, in all."""
    topk: int = 40
    """Tokens tried per trigger and position (k in the paper)."""
    beam: int = 1
    """Triggers kept from one position to the next."""

    def __post_init__(self):
        check_counts(self, "steps", "topk", "beam")

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
            ValueError: an empty slot, or more than the allowed tokens wanted per position.
        """
        problem = engine.problem
        permitted = permitted_in_slot(problem)
        allowed = int(permitted.any(0).sum())
        if self.topk > allowed:
            raise ValueError(f"topk is {self.topk} but only {allowed} tokens are allowed; lower topk")
        with SearchLog(engine, budget, on_best) as log:
            ids, best = random_triggers(permitted, 1, generator), torch.inf
            for _ in range(self.steps):
                if log.over:
                    break
                # Each choice competes with the trigger as it was, so a sweep that does not lower the loss has reached a
                # local minimum of its shortlists.
                swept, loss = self._sweep(log, objective, ids, permitted)
                if loss < best:
                    ids, best = swept, loss
                else:
                    ids, best = random_triggers(permitted, 1, generator), torch.inf
        return log.found

    def _sweep(
        self,
        log: SearchLog,
        objective: Objective,
        ids: Int[Tensor, "1 trigger"],
        permitted: Bool[Tensor, "trigger vocab"],
    ) -> tuple[Int[Tensor, "1 trigger"], float]:
        """Re-chooses every position once, left to right; (trigger, its loss or infinity if it does not re-tokenise)."""
        # One gradient, `1 trigger vocab`, ranks the tokens of all positions, although the trigger changes on the way.
        _, gradient = log.engine.gradient(objective, ids)
        beams, best = ids, torch.inf
        for position, promise in enumerate(gradient[0]):
            # First order: a swap changes the loss by the difference of two entries of the gradient; the entry of the
            # token that goes is the same for all, so the lowest entries of this row, `vocab`, are the shortlist.
            tokens = most_promising(promise[None], permitted[position], self.topk)[0]
            # Each of the beams with each of the tokens at this position, and the beams as they are.
            swaps = beams.repeat_interleave(len(tokens), 0)
            swaps[:, position] = tokens.repeat(len(beams))
            candidates = torch.cat([beams, swaps]).unique(dim=0)
            losses = log.score(objective, candidates)
            beams, best = fittest(log.engine.problem, candidates, losses, self.beam)
            if log.over:
                break
        return beams[:1], best
