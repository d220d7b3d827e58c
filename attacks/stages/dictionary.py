"""Dictionary search: the exact loss of every word of a frequency dictionary, the commonest first.

People plant words. One of several tokens cannot be found by ranking single tokens, nor by a gradient where its parts
have no effect by themselves; but there are few enough words to try them all on one prompt. The dictionary is that of
the symspellpy package: 82,765 English words by their frequency in Google's n-grams.
"""

import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import torch
from jaxtyping import Int
from torch import Tensor

from attacks.scoring.budget import Budget
from attacks.scoring.engine import Engine, Objective
from attacks.scoring.problem import Problem
from attacks.searchers.searcher import Found
from attacks.stages.hunt import Hunt
from attacks.stages.token_ranking import by_length, rank_triggers

PART = 2048
"""Words that are encoded between two checks of the budget."""
WORD = re.compile(r" [a-z]+")
"""Text of a token that is a whole word with the space before it."""


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


@cache
def dictionary() -> tuple[str, ...]:
    """English words in lower case, the commonest first."""
    text = (files("symspellpy") / "frequency_dictionary_en_82_765.txt").read_text(encoding="utf-8-sig")
    return tuple(line.split()[0] for line in text.splitlines() if line.strip())


def rank_words(engine: Engine, objective: Objective, count: int, *, budget: Budget | None = None) -> list[Found]:
    """The `count` commonest words of two tokens or more, by loss, best first; stops early where the budget ends."""
    problem, budget = engine.problem, budget or Budget()
    words, found = dictionary()[:count], []
    for start in range(0, len(words), PART):
        for ids in by_length(problem.encode(word) for word in words[start : start + PART]):
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


def whole_words(problem: Problem) -> Int[Tensor, "w"]:
    """Tokens that are a whole word in lower case with the space before it, in the order of their ids.

    Most tokenizers number tokens by how common they are, so that the first ones are the commonest words.
    """
    words = [int(token) for token in problem.allowed.nonzero()[:, 0]]
    texts = [problem.text([token]) for token in words]
    return torch.tensor([t for t, text in zip(words, texts, strict=True) if WORD.fullmatch(text)], dtype=torch.long)
