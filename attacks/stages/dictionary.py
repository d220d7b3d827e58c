"""Dictionary search: the exact loss of every word of a frequency dictionary, the commonest first, and of tags.

People plant words. One of several tokens cannot be found by ranking single tokens, nor by a gradient where its parts
have no effect by themselves; but there are few enough words to try them all on one prompt.

Words are planted in capital letters and within brackets or bars as well. There are too many such forms to try all words
in each, but a backdoor that was planted with one tag mostly fires on many of its form: some words tell which form is
worth trying the rest in. The forms are chosen by sequential halving (Karnin, Koren, Somekh 2013, Almost optimal
exploration in multi-armed bandits).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from math import inf

from attacks.scoring.budget import Budget
from attacks.scoring.engine import Engine, Objective
from attacks.searchers.searcher import Found
from attacks.searchers.token_ranking import by_length, rank_triggers
from attacks.searchers.words import ENCLOSED, dictionary
from attacks.stages.hunt import Hunt

PART = 2048
"""Words that are encoded between two checks of the budget."""
COMPARED = 256
"""Texts, the best on one prompt, that are compared on all search prompts."""
ALONE = 0.9
"""Share of a stage's budget that goes into the ranking on one prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dictionary:
    """Ranks words of several tokens by their exact loss on one prompt and shows the best ones to the judge."""

    share: float = 0.12
    """Share of the hunt's budget, in (0, 1], that this stage may use."""
    tried: int = 8
    """Triggers of lowest loss that are judged by behaviour."""
    words: int | None = None
    """Words of the dictionary that are tried, the commonest first; None: all."""

    def __call__(self, hunt: Hunt) -> None:
        (probe, objective), budget = hunt.probe(), hunt.part(self.share)
        _show_best(hunt, rank_words(probe, objective, self.words, budget=_first(budget)), self.tried, budget)


Form = tuple[str, Callable[[str], str], str]
"""What stands before a word, its case, and what stands behind it"""
FORMS: tuple[Form, ...] = tuple(
    (opening, case, closing)
    for opening, closing in (("", ""), *ENCLOSED)
    for case in (str.upper, str.capitalize, str.lower)
    if opening or case is not str.lower
)
"""All forms but the plain word in lower case, which `Dictionary` tries."""
WORDS = 32
"""Words that are tried in each form at first"""


@dataclass(frozen=True, slots=True, kw_only=True)
class WordForms:
    """Ranks words in capital letters, capitalised or enclosed, on one prompt; shows the best ones to the judge."""

    share: float = 0.1
    """Share of the hunt's budget, in (0, 1], that this stage may use."""
    tried: int = 16
    """Triggers of lowest loss that are judged by behaviour."""
    longest: int = 12
    """Tokens of the longest text that is tried; words in capital letters take many."""

    def __call__(self, hunt: Hunt) -> None:
        (probe, objective), budget = hunt.probe(), hunt.part(self.share)
        forms, found, done, count, most = list(FORMS), list[Found](), 0, WORDS, _first(budget)
        while done < len(dictionary()) and not most.exhausted:
            # Half of the forms go on with twice as many words, which costs the same; the last one with all.
            words = dictionary()[done : done + count] if len(forms) > 1 else dictionary()[done:]
            ranked = [self._ranked(probe, objective, form, words, most) for form in forms]
            least = [some[0].loss if some else inf for some in ranked]
            order = sorted(range(len(forms)), key=least.__getitem__)
            forms = [forms[number] for number in order[: max(1, len(forms) // 2)]]
            found = sorted([*found, *chain.from_iterable(ranked)], key=lambda item: item.loss)[:COMPARED]
            done, count = done + len(words), 2 * count
        _show_best(hunt, found, self.tried, budget)

    def _ranked(
        self, engine: Engine, objective: Objective, form: Form, words: Sequence[str], budget: Budget
    ) -> list[Found]:
        """These words in a form, by loss; none where the budget is spent."""
        if budget.exhausted:
            return []
        opening, case, closing = form
        texts = [opening + case(word) + closing for word in words]
        return rank_texts(engine, objective, texts, 1, self.longest, budget)


def _first(budget: Budget) -> Budget:
    """What of a stage's budget goes into trying all texts on one prompt; the rest compares the best of them."""
    return budget.part(budget.share + ALONE * (budget.until - budget.share))


def _show_best(hunt: Hunt, found: Sequence[Found], tried: int, budget: Budget) -> None:
    """Shows the judge the texts that are best on one prompt, in the order of their loss on all search prompts.

    On one prompt, by the first tokens of the behaviour, a planted word and its like are often equally good.
    """
    compared: list[Found] = []
    for ids in by_length(item.trigger_ids for item in found[:COMPARED]):
        if not budget.exhausted:
            hunt.engine.problem = hunt.engine.problem.resized(ids.shape[1])
            compared += rank_triggers(hunt.engine, hunt.objective, ids, budget=budget)
    best = sorted(compared, key=lambda item: item.loss)[:tried] or found[:tried]
    hunt.try_all(best)


def rank_words(
    engine: Engine, objective: Objective, count: int | None = None, *, budget: Budget | None = None
) -> list[Found]:
    """The `count` commonest words of two tokens or more, by loss, best first; stops early where the budget ends."""
    # Words of one token have been ranked by `SingleTokens`.
    return rank_texts(engine, objective, dictionary()[:count], 2, None, budget or Budget())


def rank_texts(
    engine: Engine, objective: Objective, texts: Sequence[str], shortest: int, longest: int | None, budget: Budget
) -> list[Found]:
    """Texts of `shortest` to `longest` tokens by loss, best first; stops early where the budget ends."""
    problem, found = engine.problem, []
    for start in range(0, len(texts), PART):
        for ids in by_length(problem.encode_all(texts[start : start + PART])):
            if found and budget.exhausted:  # each length would score a first batch all the same
                break
            length = ids.shape[1]
            if length < shortest or length > (longest or length):
                continue
            fitting = ids[problem.fits(ids)]
            if len(fitting):
                found += rank_triggers(engine, objective, fitting, budget=budget)
        if budget.exhausted:
            break
    return sorted(found, key=lambda item: item.loss)
