"""Neighbours of a winner: its words are chosen anew, at once.

A word beside the planted one in meaning or spelling may fire as well, but only in the company of the other planted
words, and one prompt hardly tells them apart. The best words of each place by one prompt are compared on more prompts
at other places; the best of these are tried with each other.
"""

from dataclasses import dataclass
from itertools import product

import torch

from attacks.dictionary import whole_words
from attacks.engine import Engine
from attacks.shrink import delete_one
from attacks.stages import Hunt
from attacks.token_ranking import rank_triggers
from attacks.triggers import check_counts
from attacks.verdict import ABSENT


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbours:
    """For a winner that is, once shrunk, a few words of one token each; else it does nothing."""

    longest: int = 3
    """words; one is left to token ranking"""
    words: int = 4096
    """commonest words of one token that are tried"""
    compared: int = 64
    """best words at each place by one prompt, compared on more"""
    prompts: int = 24
    """that they are compared on, at random places where prompts do not mark theirs"""
    rechosen: int = 6
    """best of those at each place, tried with each other"""
    tried: int = 32
    """best combinations that are judged by behaviour"""

    def __post_init__(self):
        check_counts(self, "longest", "words", "compared", "prompts", "rechosen", "tried")

    def __call__(self, hunt: Hunt) -> None:
        selection = hunt.selection
        if selection.best is None or selection.asr <= ABSENT or hunt.budget.exhausted:
            return
        words = whole_words(hunt.engine.problem)[: self.words]
        winner = delete_one(selection.best.trigger_ids, selection.rate, surprisal=selection.surprisal).trigger_ids
        if not 2 <= len(winner) <= self.longest or not set(winner) <= set(words.tolist()):
            return
        probe, objective = hunt.probe()
        problem = (selection.anywhere or hunt.engine).problem
        wide = Engine(hunt.model, problem.take(range(min(self.prompts, len(problem)))))
        hunt.budget.spent(wide.flops)
        broad, choices = hunt.built(wide, hunt.goal), []
        for place in range(len(winner)):
            if hunt.budget.exhausted:  # whatever is asked of it, a ranking makes one batch
                return
            near = torch.tensor(winner).repeat(len(words), 1)
            near[:, place] = words
            ranked = rank_triggers(probe, objective, near, budget=hunt.budget)[: self.compared]
            shown = torch.tensor([found.trigger_ids for found in ranked])
            compared = rank_triggers(wide, broad, shown, budget=hunt.budget)
            choices.append([found.trigger_ids[place] for found in compared[: self.rechosen]])
        together = torch.tensor(list(product(*choices)))
        if not hunt.budget.exhausted:
            hunt.try_best(rank_triggers(wide, broad, together, budget=hunt.budget), self.tried)
