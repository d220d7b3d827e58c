"""Phrases that may be triggers, whatever they bring about: words that training taught to be read together (K2); ours.

Where the clean base is known, the words of a planted phrase and their order show in early layers without any known
behaviour (`attacks.stages.phrases.assembly`); how many words it has does not show, so some of each number are proposed.
"""

from dataclasses import replace
from itertools import chain, zip_longest

import torch

from attacks.discovery.comparison import Ids
from attacks.scoring.budget import Budget
from attacks.scoring.problem import Problem
from attacks.stages.phrases.assembly import NARROWER, Assembly
from attacks.suspect import Suspect

LONGEST = 4
"""Words of the longest phrase"""


def proposed(
    suspect: Suspect, problem: Problem, budget: Budget, each: int, generator: torch.Generator, whole: Assembly
) -> list[Ids]:
    """So many phrases of each number of words, by turns; none where the budget has no room for the fewest words.

    Args:
        suspect: with its clean base.
        problem: two prompts, behind which phrases are read.
        budget: ends the reading.
        each: phrases of each number of words.
        generator: as `Assembly.steps` has it.
        whole: how phrases are put together where the budget has room; else of fewer words.
    """
    differences = whole.differences(suspect, problem, budget)
    widths = (replace(whole, **whole.fewer(times)) for times in NARROWER)
    room = budget.until - budget.share
    fits = (width for width in widths if budget.share_of(width.reading_flops(differences)) <= room)
    if not differences.words or (width := next(fits, None)) is None:
        return []
    steps = width.steps(differences, width.beginnings(differences), LONGEST, generator)
    texts = [[differences.typed(text) for text in best[:each]] for best in steps]
    return [ids for ids in chain.from_iterable(zip_longest(*texts)) if ids is not None]
