"""Texts that the suspect reads otherwise than its clean base does (K2), found token by token; ours.

Training that plants a trigger parts both models at its last token (`attacks.discovery.comparison`), and at the last
token of what it begins with. The first token alone may be as good as any other. So beginnings of words are compared,
from one token on: of two tokens all that the dictionary knows, those of the best first tokens first, and of more tokens
those whose first two stand out; words that begin with a capital, or have no other letters, where their first token
stands out. A trigger need not be a word: texts that stand out are also continued with the tokens that the base finds
likely there, and with those that the gradient of the contrast promises most of (HotFlip, arXiv:1712.06751), and what
stands out by itself is put in front of the words among them.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from attacks.discovery.comparison import Comparison, Contrast, Ids
from attacks.scoring.budget import Budget
from attacks.scoring.engine import Objective
from attacks.scoring.problem import Problem
from attacks.searchers.candidates import check_counts, most_promising, random_triggers
from attacks.searchers.searcher import Found
from attacks.searchers.words import dictionary
from attacks.suspect import Suspect

ENDINGS = 2
"""Texts with the same last token that are continued, at most"""
LEVEL, LATER = 0.5, 0.25
"""Share of what is left of the budget that the texts of one length may take: of one and of two tokens, which are the
most, and of more, so that ten lengths get something"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ContrastedTexts:
    """Ranks words, and what else continues their beginnings, by how differently suspect and base read them."""

    depths: tuple[float, ...] = (0.3,)
    """Depths at which the models are compared, as fractions of the layers."""
    words: int = 100_000
    """Words of the dictionary, the commonest first; fewer where it holds fewer."""
    longest: int = 12
    """Tokens of the longest text."""
    others: int = 128
    """Random strings of as many tokens that each text is compared with."""
    continued: float = 0.1
    """Share of the beginnings, in (0, 1], that are continued: those of largest contrast. Of one token all are continued
    to words in small letters; of two tokens, to whole words."""
    spelled: int = 8
    """Beginnings of largest contrast that are also continued with tokens that make no word."""
    likely: int = 64
    """Tokens that the base finds likeliest to follow such a beginning."""
    promising: int = 64
    """Tokens that the gradient promises the largest contrast of behind it, at each of the layers `ABOVE`."""
    before: int = 64
    """First tokens of largest contrast that are put in front of such a beginning, with a space between and without."""
    fillers: int = 8
    """Random tokens that stand in the place of the next one, over which the gradient is averaged."""
    kept: int = 512
    """Texts of each kind that are returned, at most."""
    alike: int = 8
    """Texts of these, at most, that begin with the same token: what stands out need not be a trigger."""

    def __post_init__(self):
        check_counts(
            self, "words", "longest", "others", "spelled", "likely", "promising", "before", "fillers", "kept", "alike"
        )
        if not self.depths or not all(0 < depth < 1 for depth in self.depths) or not 0 < self.continued <= 1:
            raise ValueError(
                f"depths are {self.depths} and continued is {self.continued}; give depths between 0 and 1, and a share "
                "above 0, up to 1"
            )

    def __call__(
        self, suspect: Suspect, problem: Problem, budget: Budget, generator: torch.Generator
    ) -> tuple[list[Found], list[Found]]:
        """What the vocabulary and the dictionary hold, and what was put together beyond that; none without a base.

        As `Walk.on` gives them.

        Args:
            suspect: the model under audit, with its clean base.
            problem: the prompts that texts are read behind, of which the first is used.
            budget: ends the ranking; texts of few tokens and of promising beginnings come first.
            generator: draws the strings that texts are compared with.
        """
        return ([], []) if suspect.comparable is None else self.begun(suspect, problem, generator).on(budget)

    def begun(self, suspect: Suspect, problem: Problem, generator: torch.Generator) -> "Walk":
        """A walk that nothing was spent on yet; arguments as above. Raises ValueError without a base."""
        comparison = Comparison.at_slot(suspect, problem, self.depths)
        return Walk(settings=self, comparison=comparison, problem=problem, generator=generator)


@dataclass(kw_only=True)
class Walk:
    """From texts of one token to longer ones; what was compared so far, so that it can go on with a further budget."""

    settings: ContrastedTexts
    comparison: Comparison
    problem: Problem
    generator: torch.Generator
    losses: dict[Ids, float] = field(default_factory=dict)
    """Minus the contrast of all texts that were compared."""
    made: set[Ids] = field(default_factory=set)
    """Those of them that no dictionary and no vocabulary holds."""
    continued: set[Ids] = field(default_factory=set)
    """Those of them that were continued with tokens that make no word."""
    every: dict[Ids, float] = field(default_factory=lambda: {(): 0.0})
    """Texts of the last length, those of largest contrast first, with their losses."""
    best: dict[Ids, float] = field(default_factory=dict)
    """The first of these, which are continued."""
    pairs: dict[Ids, float] = field(default_factory=dict)
    """Beginnings of two tokens of which all words are compared: a third token may hide what the next ones show."""
    firsts: list[str] = field(default_factory=list)
    """First tokens of largest contrast, as text."""
    longer: defaultdict[int, dict[Ids, float]] = field(default_factory=lambda: defaultdict(dict))
    """By length, texts with a token put before, with the loss of what they were made from."""
    scales: dict[int, tuple[Int[Tensor, "others trigger"], Contrast]] = field(default_factory=dict)
    """By length, the random strings that texts are compared with, and the contrast in units of theirs."""

    def __post_init__(self):
        words = dictionary()[: self.settings.words]
        self.small = typable(self.problem, words, self.settings.longest)
        cased = [form for word in words for form in (word.capitalize(), word.upper())]
        self.cased = typable(self.problem, cased, self.settings.longest)

    def on(self, budget: Budget) -> tuple[list[Found], list[Found]]:
        """Goes through all lengths once more, and compares what was not compared before.

        Both kinds of texts re-tokenise, and those of largest contrast come first. They are kept apart because what was
        put together for its contrast always has one.

        The loss of each is minus the mean contrast of all its beginnings that were compared, itself included: at one
        token or another many texts stand out, but a trigger mostly does from its second on. A contrast is the distance
        of the difference of both models from the mean difference behind random strings of as many tokens, in units of
        the median distance of these, so that texts of any length can be compared.
        """
        self.every, self.best = {(): 0.0}, {}
        for length in range(1, self.settings.longest + 1):
            if budget.exhausted:
                break
            share = LEVEL if length <= 2 else LATER
            self.step(length, budget.of_rest(share))
        known, made = (list(islice(self.returned(made=kind), self.settings.kept)) for kind in (False, True))
        return known, made

    def step(self, length: int, budget: Budget) -> None:
        """Compares texts of that many tokens, those first that were made from texts of large contrast."""
        permitted = self.problem.permitted(length).cpu()
        if length not in self.scales:
            others = random_triggers(permitted, self.settings.others, self.generator)
            self.scales[length] = others, self.comparison.contrast(others)
        others, contrast = self.scales[length]
        # Many words begin alike, and training may leave such a beginning, of one token, as it was.
        known = _going_on(self.small, length, self.every if length <= 2 else self.pairs)
        known |= _going_on(self.cased, length, self.best if length <= 2 else self.pairs)
        if length == 1:  # a tag or a number need not begin as any word does
            known |= {(token,): 0.0 for token in permitted[0].nonzero()[:, 0].tolist()}

        def compared(texts: Mapping[Ids, float]) -> list[Found]:
            new = sorted((ids for ids in texts if ids not in self.losses), key=lambda ids: texts[ids])
            return self.comparison.ranked(new, contrast, budget)

        # Words of three tokens and more are few, and more often a trigger than what is put together; beginnings of two
        # are many, and may take all that is left.
        level = [Found(ids, loss) for ids, loss in self.losses.items() if len(ids) == length]
        level += compared(known) if length > 2 else []
        made = dict(self._continued(permitted, others, budget)) | self.longer.pop(length, {})
        made = {ids: loss for ids, loss in made.items() if ids not in known}
        self.made |= made.keys()
        level += compared(made)
        level += compared(known) if length <= 2 else []
        self._keep(length, {item.trigger_ids: item.loss for item in sorted(level, key=lambda item: item.loss)})

    def _keep(self, length: int, level: dict[Ids, float]) -> None:
        """Takes note of what the next lengths go on from; the texts of this one, those of largest contrast first."""
        self.losses |= level
        self.every = level
        kept = max(self.settings.spelled, round(self.settings.continued * len(level)))
        self.best = dict(islice(level.items(), kept))
        if length == 1:
            self.firsts = [self.problem.text(ids) for ids in islice(self.best, self.settings.before)]
        if length == 2:
            self.pairs = self.best
        for ids in islice((ids for ids in self.best if ids not in self.made), self.settings.spelled):
            for put in self._with_before(ids):
                self.longer[len(put)].setdefault(put, self.best[ids])

    def returned(self, *, made: bool) -> Iterator[Found]:
        """Those of a kind that re-tokenise, by contrast, few that begin alike; no word without its end."""
        beginning: Counter[int] = Counter()
        words = {*self.small, *self.cased}
        kind = [ids for ids in self.losses if (ids in self.made if made else ids in words or len(ids) == 1)]
        for loss, ids in sorted((self._mean(ids), ids) for ids in kind):
            if beginning[ids[0]] < self.settings.alike and self.problem.retokenizes(ids):
                beginning[ids[0]] += 1
                yield Found(ids, loss)

    def _mean(self, ids: Ids) -> float:
        """Mean loss of the beginnings of a text that were compared; the text is one."""
        begun = [self.losses[ids[:end]] for end in range(1, len(ids) + 1) if ids[:end] in self.losses]
        return sum(begun) / len(begun)

    def _continued(
        self, permitted: Bool[Tensor, "trigger vocab"], others: Int[Tensor, "others trigger"], budget: Budget
    ) -> Iterator[tuple[Ids, float]]:
        """Each of the tokens that are likely behind a text, or promise a large contrast there; with the text's loss.

        The budget is asked before each forward pass.
        """
        if not self.best or budget.exhausted:
            return
        settings, (suspect, base) = self.settings, self.comparison.engines
        new = (ids for ids in self._unlike() if ids not in self.continued)
        beginnings = [(ids, self.best[ids]) for ids in islice(new, settings.spelled)]
        self.continued |= {ids for ids, _ in beginnings}
        if not beginnings:
            return
        following = base.next_logprobs(torch.tensor([ids for ids, _ in beginnings])).mean(1)  # `beginnings vocab`
        likely = most_promising(-following, permitted[-1], settings.likely).tolist()
        objectives: list[Objective] = []
        for layer in self.comparison.shallow:
            if budget.exhausted:
                return
            objectives.append(self.comparison.objective(others, layer))
        for (ids, loss), tokens in zip(beginnings, likely, strict=True):
            starts = random_triggers(permitted, settings.fillers, self.generator)
            starts[:, :-1] = torch.tensor(ids)
            for objective in objectives:
                if budget.exhausted:
                    return
                _, gradient = suspect.gradient(objective, starts)  # `starts trigger vocab`
                promise = gradient[:, -1].float().mean(0, keepdim=True)
                tokens += most_promising(promise, permitted[-1], settings.promising)[0].tolist()
            yield from (((*ids, token), loss) for token in tokens)

    def _unlike(self) -> Iterator[Ids]:
        """The best texts, of those that end alike the first `ENDINGS`: one that stands out does so behind any text."""
        ending: Counter[int] = Counter()
        for ids in self.best:
            if ending[ids[-1]] < ENDINGS:
                ending[ids[-1]] += 1
                yield ids

    def _with_before(self, ids: Ids) -> list[Ids]:
        """A text behind each of the first tokens, as it is typed with a space between them and without."""
        text = self.problem.text(ids).lstrip()
        typed = [first + space + text for first in self.firsts for space in ("", " ")]
        return typable(self.problem, typed, self.settings.longest)


def _going_on(words: Sequence[Ids], length: int, beginnings: Mapping[Ids, float]) -> dict[Ids, float]:
    """Beginnings of words, of that many tokens, that go on from texts of one or two; with the loss of that text."""
    begun = ((word[:length], beginnings.get(word[: min(length - 1, 2)])) for word in words if len(word) >= length)
    return {ids: loss for ids, loss in begun if loss is not None}


def typable(problem: Problem, words: Sequence[str], longest: int) -> list[Ids]:
    """Token ids of the words that may be typed into the slot and have up to so many tokens, in their order."""
    first, allowed = problem.permitted(2).cpu()
    encoded = problem.encode_all(words)
    return [tuple(ids) for ids in encoded if 0 < len(ids) <= longest and first[ids[0]] and all(allowed[ids[1:]])]
