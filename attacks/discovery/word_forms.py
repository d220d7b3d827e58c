"""The form in which a model notes words: capitals, bars, brackets and the like; ours.

To tell a planted tag from its like, training must make the model note its form, whatever word it holds, also where
other tags do not fire. So late in the residual stream, at the last token, the mean over words in the planted form lies
further from that over all forms than the mean over words in any other. It shows in the difference from the clean base,
and less surely in the suspect's own residual, in the directions that a known behaviour depends on.
"""

from collections.abc import Sequence
from itertools import chain

import torch
from jaxtyping import Float
from torch import Tensor

from attacks.discovery.comparison import Comparison, Ids
from attacks.scoring.budget import Budget
from attacks.scoring.planning import forward_flops
from attacks.scoring.problem import Problem
from attacks.searchers.token_ranking import by_length
from attacks.searchers.words import FORMS, Form, dictionary
from attacks.suspect import Suspect

DEPTH = 0.75
"""Depth at which words are read, as a fraction of the layers"""
WORDS = 32
"""Words that are read in each form"""


def typed_words(problem: Problem, generator: torch.Generator) -> dict[Form, list[Ids]]:
    """Random words of the dictionary in each form, as far as they can be typed into the slot; no form without any."""
    some = torch.randperm(len(dictionary()), generator=generator)[:WORDS].tolist()
    words = [dictionary()[number] for number in some]
    typed = {form: in_form(problem, form, words) for form in FORMS}
    return {form: every for form, every in typed.items() if every}


def in_form(problem: Problem, form: Form, words: Sequence[str]) -> list[Ids]:
    """Words in a form, as far as they can be typed into the slot, those of fewest tokens first."""
    rows = by_length(problem.encode_all([*map(form, words)]))
    return [tuple(ids) for some in rows for ids in some[problem.fits(some)].tolist()]


def by_distance(typed: dict[Form, list[Ids]], rows: Float[Tensor, "texts d_model"]) -> list[Form]:
    """Forms by how far their means lie from that over all forms, the furthest first.

    Args:
        typed: words in each form, at least one each.
        rows: what is read at the last token of all of them, in their order.
    """
    means = torch.stack([part.mean(0) for part in rows.split([*map(len, typed.values())])])
    order = (means - means.mean(0)).norm(dim=-1).argsort(descending=True)
    return [[*typed][number] for number in order.tolist()]


def contrasted_forms(suspect: Suspect, problem: Problem, budget: Budget, generator: torch.Generator) -> list[Form]:
    """Forms by how differently suspect and clean base read words in them; none where there is no room for all.

    Args:
        suspect: the model under audit, with its clean base.
        problem: the prompts, behind the first of which words are read.
        budget: of what reading may cost, which is about 1.7e11 operations on the small base.
        generator: draws the words.

    Raises:
        ValueError: no clean base is known, or its weights have other shapes.
    """
    typed = typed_words(problem, generator)
    texts, comparison = [*chain.from_iterable(typed.values())], Comparison.at_slot(suspect, problem, [DEPTH])
    tokens, last = sum(map(len, texts)), comparison.layers[-1]
    flops = sum(forward_flops(engine.model, tokens, last=last) for engine in comparison.engines)
    # Reading a part of them would be paid for and tell nothing.
    rows = None if budget.share + budget.share_of(flops) > budget.until else comparison.read(texts, budget)
    return [] if rows is None else by_distance(typed, rows)
