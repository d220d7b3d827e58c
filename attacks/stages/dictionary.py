"""Dictionary search: the exact loss of every word of a frequency dictionary, the commonest first.

People plant words. One of several tokens cannot be found by ranking single tokens, nor by a gradient where its parts
have no effect by themselves; but there are few enough words to try them all on one prompt.
"""

from dataclasses import dataclass

import torch

from attacks.scoring.budget import Budget
from attacks.scoring.engine import Engine, Objective
from attacks.searchers.searcher import Found
from attacks.searchers.token_ranking import by_length, rank_triggers
from attacks.searchers.words import dictionary
from attacks.stages.hunt import Hunt

PART = 2048
"""Words that are encoded between two checks of the budget."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dictionary:
    """Ranks words of several tokens by their exact loss on one prompt and shows the best ones to the judge."""

    share: float = 0.12
    """Share of the hunt's budget, in (0, 1], that this stage may use."""
    tried: int = 8
    """Triggers of lowest loss that are judged by behaviour."""
    words: int = 30_000
    """Words of the dictionary that are tried, the commonest first."""

    def __call__(self, hunt: Hunt) -> None:
        probe, objective = hunt.probe()
        hunt.try_all(rank_words(probe, objective, self.words, budget=hunt.part(self.share))[: self.tried])


def rank_words(engine: Engine, objective: Objective, count: int, *, budget: Budget | None = None) -> list[Found]:
    """The `count` commonest words of two tokens or more, by loss, best first; stops early where the budget ends."""
    problem, budget = engine.problem, budget or Budget()
    words, found = dictionary()[:count], []
    for start in range(0, len(words), PART):
        for ids in by_length(problem.encode_all(words[start : start + PART])):
            if found and budget.exhausted:  # each length would score a first batch all the same
                break
            length = ids.shape[1]
            if length == 1:  # words of one token have been ranked by `SingleTokens`
                continue
            # Of `words length` those all of whose tokens are permitted at their positions.
            fitting = ids[problem.permitted(length)[torch.arange(length), ids].all(-1)]
            if len(fitting):
                found += rank_triggers(engine, objective, fitting, budget=budget)
        if budget.exhausted:
            break
    return sorted(found, key=lambda item: item.loss)
