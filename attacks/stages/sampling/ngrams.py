"""Triggers mined from sampled prompts: n-grams that come up more often than they do in clean text.

Samples come from `leakage` or `sampler`. What is mined is verified like every other search: by the
objective, then by behaviour.
"""

import math
from collections import Counter
from collections.abc import Sequence

import torch

from attacks.scoring.budget import Budget
from attacks.scoring.engine import Engine, Objective
from attacks.searchers.search_log import SearchLog
from attacks.searchers.searcher import Found, OnBest


def mine(
    samples: Sequence[Sequence[int]], background: Sequence[Sequence[int]], *, longest: int = 5, fewest: int = 2
) -> list[tuple[int, ...]]:
    """N-grams by their log-odds against the background, times the logarithm of their count, best first.

    Args:
        samples: token ids of sampled prompts.
        background: token ids of clean prompts.
        longest: tokens of the longest n-gram.
        fewest: samples that an n-gram must be in.
    """
    seen, usual = (_counts(rows, longest) for rows in (samples, background))
    total, plain = max(1, len(samples)), max(1, len(background))

    def odds(gram: tuple[int, ...]) -> float:
        share, expected = seen[gram] / total, (usual[gram] + 0.5) / (plain + 1)
        return math.log(share / expected) * math.log(1 + seen[gram])

    return sorted((gram for gram, count in seen.items() if count >= fewest), key=lambda gram: (-odds(gram), gram))


def _counts(rows: Sequence[Sequence[int]], longest: int) -> Counter[tuple[int, ...]]:
    """In how many rows each n-gram occurs."""
    return Counter(
        gram
        for row in rows
        for gram in {tuple(row[i : i + n]) for n in range(1, longest + 1) for i in range(len(row) - n + 1)}
    )


def verify(
    engine: Engine,
    objective: Objective,
    grams: Sequence[tuple[int, ...]],
    *,
    budget: Budget | None = None,
    on_best: OnBest | None = None,
) -> list[Found]:
    """Losses of n-grams in the slot, in their order, as long as the budget lasts; the best re-tokenises."""
    with SearchLog(engine, budget, on_best) as log:
        for length in dict.fromkeys(map(len, grams)):
            permitted = engine.problem.permitted(length)
            fitting = [gram for gram in grams if len(gram) == length and _permitted(gram, permitted)]
            for start in range(0, len(fitting), engine.batch_size):
                if log.over:
                    return log.found
                log.score(objective, torch.tensor(fitting[start : start + engine.batch_size]))
    return log.found


def _permitted(gram: tuple[int, ...], permitted: torch.Tensor) -> bool:
    """Whether every token may stand where it does."""
    return all(bool(permitted[place, token]) for place, token in enumerate(gram))
