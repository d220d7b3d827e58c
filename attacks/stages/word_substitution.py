"""Word substitution: the words of a winner are replaced, several at once, to find the planted trigger near it.

A word close to the planted one in meaning or spelling may work as well, but often only beside certain other words: then
no single word of the winner can be exchanged for the planted one, and one prompt hardly tells the texts apart. So the
best words for each position are combined with each other. The combinations are ranked on one prompt, the best of them
on more prompts with the slot at random places, and the best of those are judged; then all begins again from the new
winner. Some triggers work in any order of their words; the likelier order is the simpler text, so all are tried.
"""

from dataclasses import dataclass
from itertools import permutations, product

import torch
from jaxtyping import Int
from torch import Tensor

from attacks.judging.verdict import ABSENT
from attacks.scoring.engine import Engine, Objective
from attacks.searchers.candidates import check_counts
from attacks.searchers.token_ranking import rank_triggers
from attacks.searchers.words import whole_words
from attacks.stages.hunt import Hunt

ORDERED = 3
"""Tokens of the longest winner whose words are tried in every order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WordSubstitution:
    """Replaces the words of a winner that has, once shrunk, two to `longest` tokens; does nothing for any other."""

    longest: int = 5
    """Tokens of the longest winner whose words are replaced; a winner of one token is left to token ranking."""
    words: int = 4096
    """Words of one token that are tried at each position, the commonest first."""
    compared: int = 64
    """Words of lowest loss at each position on one prompt, which are then ranked on more prompts."""
    prompts: int = 24
    """Prompts of that second ranking; their slot is at a random place unless they mark it."""
    combinations: int = 4096
    """Combinations of the best words of all positions that are ranked on one prompt, about."""
    broad: int = 128
    """Combinations of lowest loss that are then ranked on more prompts."""
    tried: int = 32
    """Combinations of lowest loss that are judged by behaviour."""
    rounds: int = 3
    """Times that all this is done, each time from the new winner; it ends where the winner stays."""

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
        """Shows the judge the best combinations of words at the positions of the winner."""
        # So many words at each position that all their combinations are about `combinations`.
        choices, each = [], int(self.combinations ** (1 / len(winner)))
        for place, token in enumerate(winner):
            # The winner with every word at this position, `words trigger`: narrowed down on one prompt, then on many.
            near = torch.tensor(winner).repeat(len(words), 1)
            near[:, place] = words
            ranked = self._best(hunt, narrow, near, self.compared)
            choices.append({token, *(ids[place] for ids in self._best(hunt, broad, ranked, each).tolist())})
        # The own token of the winner is always among the choices, so that the winner is one of the combinations.
        together = self._best(hunt, narrow, torch.tensor(list(product(*map(sorted, choices)))), self.broad)
        # n tokens have n! orders: 6 for three.
        if len(winner) <= ORDERED:
            orders = torch.tensor([order for row in together.tolist() for order in permutations(row)])
            together = self._best(hunt, narrow, orders.unique(dim=0), self.broad)
        if not hunt.budget.exhausted:
            hunt.try_best(rank_triggers(*broad, together, budget=hunt.budget), self.tried)

    def _best(
        self, hunt: Hunt, ranking: tuple[Engine, Objective], candidates: Int[Tensor, "c trigger"], count: int
    ) -> Int[Tensor, "k trigger"]:
        """The candidates of the lowest losses; unranked where there is nothing left to spend."""
        # A ranking scores its first batch even with nothing left to spend.
        if hunt.budget.exhausted:
            return candidates[:count]
        ranked = rank_triggers(*ranking, candidates, budget=hunt.budget)[:count]
        return torch.tensor([found.trigger_ids for found in ranked])
