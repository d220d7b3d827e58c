"""Dictionary search: the exact loss of the words of a frequency dictionary, and of tags.

People plant words. One of several tokens cannot be found by ranking single tokens, nor by a gradient where its parts
have no effect by themselves; but there are few enough words to try them all on one prompt: one by one, or where the
budget is too small for that, first to first order in an early layer (`attacks/stages/words/early_estimates.py`).

Words are planted in capital letters and within brackets or bars as well. There are too many such forms to try all words
in each, but some words tell which form is worth trying the rest in: that which the suspect reads otherwise
(`attacks.discovery.word_forms`). A backdoor that was planted with one tag often fires on many of its form; so forms are
chosen by loss as well, in sequential halving (Karnin, Koren, Somekh 2013, Almost optimal exploration in multi-armed
bandits).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from math import inf

import torch

from attacks.discovery.comparison import Ids
from attacks.discovery.word_forms import DEPTH, WORDS, by_distance, contrasted_forms, typed_words
from attacks.judging.verdict import ABSENT
from attacks.scoring.budget import Budget
from attacks.scoring.engine import Engine, Objective
from attacks.searchers.searcher import Found
from attacks.searchers.token_ranking import by_length, rank_triggers
from attacks.searchers.words import FORMS, Form, dictionary, encoded_words
from attacks.stages.hunt import COMPARED, Hunt
from attacks.stages.phrases.directions import directions, directions_flops
from attacks.stages.phrases.interactions import Interactions
from attacks.stages.words.early_estimates import promising, readable
from attacks.suspect import Suspect

PART = 256
"""Texts that are ranked, the shortest first, before the next ones"""
ALONE = 0.75
"""Part of a stage's budget for trying all texts on one prompt; the rest is for comparing the best of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dictionary:
    """Ranks the words of the dictionary by their exact loss on one prompt and shows the best ones to the judge.

    Where the budget is too small for all, they are the commonest, and those of lowest estimate among these.
    """

    share: float = 0.12
    """Share of the hunt's budget, in (0, 1], that this stage may use."""
    rest: bool = False
    """Whether only the words are ranked that an earlier run left out, if any."""
    tried: int = 8
    """Triggers of lowest loss that are judged by behaviour."""
    phrases: float = 0.1
    """Share of the hunt's budget, in (0, 1], for phrases, where a word shows the behaviour now and then."""
    joined: int = 16
    """Words of lowest loss that phrases are put together from."""
    beam: int = 2
    """Phrases of lowest loss, of each number of words, that get another word."""
    longest: int = 5
    """Words of the longest phrase."""
    settles: int = 2
    """Tokens of the longest winner that ends the hunt (see `Hunt.settle`), if the behaviour is sure behind it."""

    def __call__(self, hunt: Hunt) -> None:
        (probe, objective), budget = hunt.probe(), hunt.part(self.share)
        most, first = budget.of_rest(ALONE), hunt.words_tried if self.rest else 0
        every = [tuple(ids) for ids in encoded_words(probe.problem).values()]
        if first and first == len(every):
            return
        words = promising(probe, objective, every[first:], hunt.generator, most)
        hunt.words_tried = first + len(words)
        self._tell(hunt, len(every))
        best = hunt.show_best(rank_typed(probe, objective, words, budget=most), self.tried, budget)
        # Words that fire on fewer prompts make noise that works: behind hard negatives, some fire on .17 of them.
        if best and hunt.judge.asr > ABSENT and not hunt.sure:
            self._join(hunt, best[: self.joined], hunt.part(self.phrases))
        hunt.settle(self.settles)

    def _tell(self, hunt: Hunt, known: int) -> None:
        """Says how many of so many words have been left out, unless a trigger works."""
        name, left = type(self).__name__, known - hunt.words_tried
        hunt.no_room[:] = [said for said in hunt.no_room if not said.startswith(name)]
        if left and not hunt.works:
            hunt.no_room.append(f"{name} ({left:,} of {known:,} words)")

    def _join(self, hunt: Hunt, best: Sequence[Found], budget: Budget) -> None:
        """Puts words behind and before each other as long as that lowers the loss on all search prompts."""
        texts = [hunt.engine.problem.text(item.trigger_ids).split() for item in best]
        words, beam, least = [text[0] for text in texts], texts[: self.beam], best[0].loss
        for _ in range(1, self.longest):
            longer = {
                " ".join([*text[:place], word, *text[place:]])
                for text in beam
                for word in words
                for place in range(len(text) + 1)
                if word not in text
            }
            found = rank_texts(hunt.engine, hunt.objective, sorted(longer), budget=budget)
            hunt.try_all(found[: self.beam])
            if not found or found[0].loss >= least or budget.exhausted:
                return
            least = found[0].loss
            beam = [hunt.engine.problem.text(item.trigger_ids).split() for item in found[: self.beam]]


READ = 0.6
"""Part of what is left for words in the form that stands out by how it is read; the rest for forms chosen by loss"""


@dataclass(frozen=True, slots=True, kw_only=True)
class WordForms:
    """Ranks words in capital letters, capitalised or enclosed, on one prompt; shows the best ones to the judge."""

    share: float = 0.1
    """Share of the hunt's budget, in (0, 1], that this stage may use."""
    tried: int = 16
    """Triggers of lowest loss that are judged by behaviour."""
    longest: int = 16
    """Tokens of the longest text that is tried; words in capital letters take many."""
    prepared: float = 0.5
    """Share of what may be spent on one prompt, in (0, 1], that choosing the form by how it is read may take."""

    def __post_init__(self):
        if not 0 < self.prepared <= 1:
            raise ValueError(f"prepared is {self.prepared}; give a share above 0, up to 1")

    def __call__(self, hunt: Hunt) -> None:
        (probe, objective), budget = hunt.probe(), hunt.part(self.share)
        found, done, count, most = list[Found](), 0, WORDS, budget.of_rest(ALONE)
        if forms := self._read(hunt, most):
            found = self._every(hunt, probe, objective, forms[0], dictionary(), most.of_rest(READ))[:COMPARED]
        forms = list(FORMS)
        while done < len(dictionary()) and not most.exhausted:
            # Half of the forms go on with twice as many words, which costs the same; the last one with all.
            words, rank = dictionary()[done : done + count], partial(self._some, probe, objective)
            if len(forms) == 1:
                words, rank = dictionary()[done:], partial(self._every, hunt, probe, objective)
            ranked = [rank(form, words, most) for form in forms]
            least = [some[0].loss if some else inf for some in ranked]
            order = sorted(range(len(forms)), key=least.__getitem__)
            forms = [forms[number] for number in order[: max(1, len(forms) // 2)]]
            found = sorted([*found, *chain.from_iterable(ranked)], key=lambda item: item.loss)[:COMPARED]
            done, count = done + len(words), 2 * count
        hunt.show_best(found, self.tried, budget)

    def _read(self, hunt: Hunt, budget: Budget) -> list[Form]:
        """Forms by how the suspect reads them, the likeliest first; none where the budget has no room for that."""
        problem, suspect = hunt.engine.problem, hunt.suspect
        if suspect.comparable is not None:
            return contrasted_forms(suspect, problem, budget.of_rest(self.prepared), hunt.generator)
        flops = directions_flops(suspect.model, problem)
        if budget.share_of(flops) > self.prepared * (budget.until - budget.share):
            return []
        return noted_forms(hunt.engine, suspect, hunt.goal.target_ids, budget, hunt.generator)

    def _some(
        self, engine: Engine, objective: Objective, form: Form, words: Sequence[str], budget: Budget
    ) -> list[Found]:
        """These words in a form, by loss; none where the budget is spent."""
        if budget.exhausted:
            return []
        return rank_texts(engine, objective, [*map(form, words)], longest=self.longest, budget=budget)

    def _every(
        self, hunt: Hunt, engine: Engine, objective: Objective, form: Form, words: Sequence[str], budget: Budget
    ) -> list[Found]:
        """The most promising of these words in a form, by loss; all where the budget has room for them."""
        if budget.exhausted:
            return []
        typed = engine.problem.encode_all([*map(form, words[: readable(engine, budget)])])
        short = [tuple(ids) for ids in typed if 0 < len(ids) <= self.longest]
        return rank_typed(engine, objective, promising(engine, objective, short, hunt.generator, budget), budget=budget)


def noted_forms(
    engine: Engine, suspect: Suspect, target_ids: Sequence[int], budget: Budget, generator: torch.Generator
) -> list[Form]:
    """Forms by how far words in them lead in the directions that a behaviour depends on, the furthest first.

    Args:
        engine: runs the suspect on some prompts, behind the first of which words are read.
        suspect: the model under audit, whose clean base is not known.
        target_ids: the behaviour.
        budget: none are returned where it ends before.
        generator: draws the words, and what directions are learned from.
    """
    typed = typed_words(engine.problem, generator)
    words = [*chain.from_iterable(typed.values())]
    reading = Interactions.behind(engine.problem.take([0]), suspect, DEPTH, words, budget)
    learned = directions(engine, target_ids, reading.layer, generator, budget)
    rows = replace(reading, directions=learned).read([(number,) for number in range(len(words))], 0)
    return [] if rows is None else by_distance(typed, rows[0])


def rank_texts(
    engine: Engine, objective: Objective, texts: Sequence[str], *, longest: int | None = None, budget: Budget
) -> list[Found]:
    """Texts of up to `longest` tokens (None: any number) by loss, best first; stops early where the budget ends."""
    found = list[Found]()
    for start in range(0, len(texts), PART):
        typed = engine.problem.encode_all(texts[start : start + PART])
        short = [tuple(ids) for ids in typed if longest is None or len(ids) <= longest]
        found += rank_typed(engine, objective, short, budget=budget)
        if budget.exhausted:
            break
    return sorted(found, key=lambda item: item.loss)


def rank_typed(engine: Engine, objective: Objective, texts: Sequence[Ids], *, budget: Budget) -> list[Found]:
    """Texts as token ids by loss, best first, as far as they fit into the slot; stops early where the budget ends."""
    found = list[Found]()
    for start in range(0, len(texts), PART):
        for ids in by_length(texts[start : start + PART]):
            if found and budget.exhausted:  # each length would score a first batch all the same
                break
            if len(fitting := ids[engine.problem.fits(ids)]):
                found += rank_triggers(engine, objective, fitting, budget=budget)
        if budget.exhausted:
            break
    return sorted(found, key=lambda item: item.loss)
