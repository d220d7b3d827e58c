"""Greedy accretion: a trigger grown token by token with a beam, then re-chosen position by position (no single paper).

While it grows, each of `beam` triggers of k tokens becomes 2 * `shortlist` triggers of k + 1: one more token in front
or at the end. Once the slot is full, each position in turn is tried with every token on its shortlist. After each
choice the `beam` triggers of lowest loss go on.

The shortlist by gradient is that of AutoPrompt (Shin, Razeghi, Logan, Wallace, Singh 2020, arXiv:2010.15980, equation
2), taken at a random placeholder where a token is added; unlike there, the trigger begins empty and the new token may
stand in front or at the end. With the whole vocabulary in place of a shortlist every choice is exact token ranking
(token_ranking.py) and nothing is left to chance: the search then ends when a sweep improves nothing. With a
shortlist it begins anew from other placeholders.

Triggers of every length up to the slot's are offered: they are scored in any case, a shorter one with a lower loss is
the better trigger, and a budget that ends while the trigger grows leaves something.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from attacks.scoring.budget import Budget
from attacks.scoring.engine import Engine, Objective
from attacks.searchers.candidates import check_counts, fittest, most_promising, permitted_in_slot, random_triggers
from attacks.searchers.search_log import SearchLog
from attacks.searchers.searcher import Found, OnBest

PART = 2048
"""Candidates scored between two looks at the budget; a constant, because the batch size must not change the results."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Accretion:
    """Adds the best token in front or at the end until the slot is full, then re-chooses every position in turn."""

    steps: int = 250
    """Choices of a token in all, while the trigger grows and while its positions are re-chosen."""
    beam: int = 4
    """Triggers kept from one choice to the next."""
    shortlist: int | None = 128
    """Tokens scored per trigger and position, chosen by gradient; None: all that are permitted."""

    def __post_init__(self):
        check_counts(self, "steps", "beam")
        if self.shortlist is not None and self.shortlist < 1:
            raise ValueError(f"shortlist is {self.shortlist}; it must be at least 1, or None")

    def __call__(
        self,
        engine: Engine,
        objective: Objective,
        generator: torch.Generator,
        budget: Budget | None = None,
        on_best: OnBest | None = None,
    ) -> list[Found]:
        """Every improvement that re-tokenises, of any length up to the slot's; best first. An interrupt keeps them.

        Raises:
            ValueError: an empty slot, or a shortlist of more than the allowed tokens.
        """
        problem = engine.problem
        allowed = int(permitted_in_slot(problem).any(0).sum())
        if self.shortlist is not None and self.shortlist > allowed:
            raise ValueError(f"shortlist is {self.shortlist} but only {allowed} tokens are allowed; lower shortlist")
        with SearchLog(engine, budget, on_best) as log:
            choices = self._choices(log, objective, generator)
            for _ in range(self.steps):
                if log.over or next(choices, None) is None:
                    break
        return log.found

    def _choices(self, log: SearchLog, objective: Objective, generator: torch.Generator) -> Iterator[float]:
        """The search, one choice of a token at a time; yields the loss of the best trigger that re-tokenises."""
        problem = log.engine.problem
        length = problem.trigger_length
        while True:
            beams, best, improved = torch.empty(1, 0, dtype=torch.long), torch.inf, True
            while beams.shape[1] < length:
                # The gradient needs a token at the new position, so a random one stands there; the same for all beams.
                blank = random_triggers(problem.first[None].cpu(), 1, generator).expand(len(beams), 1)
                front = self._variants(log.engine, objective, torch.cat([blank, beams], dim=1), 0)
                end = self._variants(log.engine, objective, torch.cat([beams, blank], dim=1), beams.shape[1])
                beams, best = self._keep(log, objective, torch.cat([front, end]))
                yield best
            # The slot is full. A token that was best when it was added need not be best beside those added later, so
            # the positions are re-chosen in turn until a whole sweep lowers nothing (coordinate descent).
            while improved:
                before = best
                for position in range(length):
                    # The beams compete with their own variants, so that a sweep never makes the best one worse.
                    variants = self._variants(log.engine, objective, beams, position)
                    beams, best = self._keep(log, objective, torch.cat([beams, variants]))
                    yield best
                improved = best < before
            # Nothing was drawn at random if every token was tried: a second run would repeat the first.
            if self.shortlist is None:
                return

    def _variants(
        self, engine: Engine, objective: Objective, triggers: Int[Tensor, "c trigger"], position: int
    ) -> Int[Tensor, "variants trigger"]:
        """Each trigger with every token on its shortlist at `position`."""
        permitted = engine.problem.permitted(triggers.shape[1])[position].cpu()
        tokens = permitted.nonzero()[:, 0].expand(len(triggers), -1)
        if self.shortlist is not None:
            _, gradient = engine.gradient(objective, triggers)
            tokens = most_promising(gradient[:, position], permitted, self.shortlist)
        # `c` triggers times their shortlists: `c * shortlist trigger`.
        variants = triggers.repeat_interleave(tokens.shape[1], 0)
        variants[:, position] = tokens.flatten()
        return variants

    def _keep(
        self, log: SearchLog, objective: Objective, candidates: Int[Tensor, "c trigger"]
    ) -> tuple[Int[Tensor, "beam trigger"], float]:
        """Scores the candidates as far as the budget goes; the `beam` fittest, and the loss of the first."""
        # Beams that differ in the position at hand have the same variants; each is scored once.
        candidates = candidates.unique(dim=0)
        losses: list[Tensor] = []
        for part in candidates.split(PART):
            losses.append(log.score(objective, part))
            if log.over:
                break
        scored = torch.cat(losses)
        return fittest(log.engine.problem, candidates[: len(scored)], scored, self.beam)
