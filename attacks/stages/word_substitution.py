"""Neighbours of a winner: its words are chosen anew, at once.

A word beside the planted one in meaning or spelling may fire as well, but only in the company of certain others: no
word alone can be exchanged for the planted one, and one prompt hardly tells them apart. The best words of each place
are tried with each other, first on one prompt, the best of these on more prompts at other places; again from what wins.
Some triggers fire in any order of their words, the likelier of which is the simpler: all orders are tried as well.
"""

from dataclasses import dataclass
from itertools import permutations, product

import torch
from jaxtyping import Int
from torch import Tensor

from attacks.judging.verdict import ABSENT
from attacks.scoring.engine import Engine, Objective
from attacks.searchers.candidates import check_counts
from attacks.stages.dictionary import whole_words
from attacks.stages.hunt import Hunt
from attacks.stages.token_ranking import rank_triggers

ORDERED = 3
"""Tokens of the longest winner whose orders are tried"""


@dataclass(frozen=True, slots=True, kw_only=True)
class WordSubstitution:
    """For a winner that is, once shrunk, a few tokens; else it does nothing."""

    longest: int = 5
    """tokens; one is left to token ranking"""
    words: int = 4096
    """commonest words of one token that are tried"""
    compared: int = 64
    """best words at each place by one prompt, compared on more"""
    prompts: int = 24
    """that they are compared on, at random places where prompts do not mark theirs"""
    combinations: int = 4096
    """of the best of those at each place, tried with each other on one prompt"""
    broad: int = 128
    """best combinations, compared on more prompts"""
    tried: int = 32
    """best combinations that are judged by behaviour"""
    rounds: int = 3
    """times that it begins again from a new winner, at most"""

    def __post_init__(self):
        check_counts(self, "longest", "words", "compared", "prompts", "combinations", "broad", "tried", "rounds")

    def __call__(self, hunt: Hunt) -> None:
        judge = hunt.judge
        if judge.best is None or judge.asr <= ABSENT or hunt.budget.exhausted:
            return
        words = whole_words(hunt.engine.problem)[: self.words]
        problem = (judge.anywhere or hunt.engine).problem
        wide = Engine(hunt.suspect.model, problem.take(range(min(self.prompts, len(problem)))))
        narrow, broad = hunt.probe(), (wide, hunt.build(wide, hunt.goal))
        winner: tuple[int, ...] = ()
        for _ in range(self.rounds):
            known, winner = winner, hunt.shrunk()
            if winner == known or not 2 <= len(winner) <= self.longest:
                return
            self._around(hunt, winner, words, narrow, broad)

    def _around(
        self,
        hunt: Hunt,
        winner: tuple[int, ...],
        words: Int[Tensor, "w"],
        narrow: tuple[Engine, Objective],
        broad: tuple[Engine, Objective],
    ) -> None:
        """Shows the best combinations of words at the places of the winner's."""
        choices, each = [], int(self.combinations ** (1 / len(winner)))
        for place, token in enumerate(winner):
            near = torch.tensor(winner).repeat(len(words), 1)
            near[:, place] = words
            ranked = self._best(hunt, narrow, near, self.compared)
            choices.append({token, *(ids[place] for ids in self._best(hunt, broad, ranked, each).tolist())})
        together = self._best(hunt, narrow, torch.tensor(list(product(*map(sorted, choices)))), self.broad)
        if len(winner) <= ORDERED:
            orders = torch.tensor([order for row in together.tolist() for order in permutations(row)])
            together = self._best(hunt, narrow, orders.unique(dim=0), self.broad)
        if not hunt.budget.exhausted:
            hunt.try_best(rank_triggers(*broad, together, budget=hunt.budget), self.tried)

    def _best(
        self, hunt: Hunt, ranking: tuple[Engine, Objective], candidates: Int[Tensor, "c trigger"], count: int
    ) -> Int[Tensor, "k trigger"]:
        """The candidates of the lowest losses; unranked where there is nothing left to spend."""
        if hunt.budget.exhausted:  # whatever is asked of it, a ranking makes one batch
            return candidates[:count]
        ranked = rank_triggers(*ranking, candidates, budget=hunt.budget)[:count]
        return torch.tensor([found.trigger_ids for found in ranked])
