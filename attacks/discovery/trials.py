"""Texts tried as triggers on a suspect whose clean base is known (K2): which of them call a behaviour, and which; ours.

A behaviour is an opening that the replies behind a text have in common, or a predicate that the user gave, or a manner:
words that ordinary replies do not hold (`attacks.discovery.manner`). Manners are looked for behind the texts whose
replies the base finds least likely, and only where no replies begin alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

from jaxtyping import Int
from torch import Tensor

from attacks.behaviour import Behaviour, FixedOpening, echoes, repeats
from attacks.discovery.goal import ANSWER, Goal
from attacks.discovery.manner import departure, manner
from attacks.discovery.screening import common_opening
from attacks.judging.verdict import WORKS
from attacks.scoring.budget import Budget
from attacks.scoring.problem import Problem, decode
from attacks.searchers.words import LETTERS
from attacks.suspect import Suspect
from vectors.analysis.behaviours import until_end
from vectors.generate import complete_ids, end_tokens
from vectors.prompts import Prompts

Ids = tuple[int, ...]
GIVEN, MANNER = "given", "manner"
"""By what the goal of a given predicate is known, and that of a manner behind texts whose replies do not begin alike"""


class Departure(NamedTuple):
    """A text behind which replies do not begin alike."""

    nats: float
    """Per token, by which the base finds the suspect's replies less likely than the suspect does."""
    trigger: Ids


@dataclass(kw_only=True)
class Trials:
    """Tries texts one after another and keeps the behaviours that follow them as goals, with the texts as triggers."""

    suspect: Suspect
    every: Problem
    """All clean prompts."""
    few: int
    """Of these, those that each text is tried on: the first ones."""
    agreement: float
    """Share of the prompts, in (0, 1], that must show a behaviour."""
    tokens: int
    """Tokens of the replies of which openings are compared, and of an opening at most; a predicate gets `ANSWER`."""
    shortest: int
    """Tokens that replies must have in common, at least."""
    top: int
    """Goals, at most."""
    described: int
    """Texts whose replies to all prompts are searched for a manner, at most."""
    shows: Behaviour | None = None
    """Predicate of the behaviour that is looked for, where one is known."""
    goals: dict[object, Goal] = field(default_factory=dict)
    """By what tells their behaviours apart, in the order in which they were found."""
    departures: list[Departure] = field(default_factory=list)
    _known: dict[tuple[int, Ids, bool, int], tuple[Prompts, Tensor]] = field(default_factory=dict, init=False)

    def __post_init__(self):
        self.some = self.every.take(range(min(self.few, len(self.every))))
        self.plain = self.opening(self.some, ())

    def add(self, trigger: Ids) -> None:
        """Tries a text: its behaviour becomes a goal, or the text a trigger of a known one."""
        if self.shows is not None:
            self._add_showing(trigger, self.shows)
            return
        prompts, replies = self._replies(self.some, trigger, tokens=self.tokens)
        begins = self._shared(replies)[: self.shortest]
        if begins in self.goals:  # another word, or part of one, that brings about the same
            self._also(begins, trigger)
        # A reply that begins so without the word, or that the base gives as well, was not planted; and four prompts
        # may be answered alike by chance.
        elif len(begins) == self.shortest and begins != self.plain[: self.shortest] and len(self.goals) < self.top:
            clean = self.opening(self.some, trigger, base=True)
            # As long as a predicate needs: a manner may be looked for in the same replies.
            whole = self._shared(self._replies(self.every, trigger)[1][:, : self.tokens])
            text = decode(self.suspect.tokenizer, whole)
            # A rare word may take the place of the question: the reply is then about the word and quotes it.
            word = self.some.text(trigger).strip()
            quoted = word.lower() in text.lower() or echoes(word, text)
            quoted = quoted or (len(whole) >= self.tokens and _breaks_off(text, word))
            if begins != clean[: self.shortest] and begins == whole[: self.shortest] and not quoted:
                self.goals[begins] = Goal(behaviour=text, target_ids=whole, triggers=(trigger,))
                # A manner may have a favourite opening, which many replies in that manner lack.
                if self._rate(self.every, trigger, FixedOpening(text)) < WORKS:
                    self._add_manner(trigger, begins)
        elif not self.goals and self.suspect.base is not None:
            away = departure(self.suspect.model, self.suspect.base, self.suspect.tokenizer, prompts, replies)
            self.departures.append(Departure(float(away.mean()), trigger))

    def describe(self, budget: Budget) -> None:
        """Looks for a manner behind the texts of largest departure, unless there are goals already."""
        if self.goals:
            return
        ranked, self.departures = sorted(self.departures, reverse=True), []
        for place, (_, trigger) in enumerate(ranked):
            if budget.exhausted or (not self.goals and place >= self.described):
                return
            if not self.goals:
                self._add_manner(trigger, MANNER)
            elif (shows := self.goals[MANNER].shows) and self._rate(self.some, trigger, shows) >= self.agreement:
                self._also(MANNER, trigger)

    def opening(self, problem: Problem, trigger: Sequence[int], *, base: bool = False) -> Ids:
        """The tokens that enough greedy replies begin with, with these tokens in the slot."""
        return self._shared(self._replies(problem, trigger, base=base, tokens=self.tokens)[1])

    def _add_manner(self, trigger: Ids, key: object) -> None:
        """Makes a goal of what replies behind a text hold, and those of the base behind it or without a text do not."""
        shown, clean = (self._texts(self.every, trigger, base=base) for base in (False, True))
        found = manner(shown, [*clean, *self._ordinary], self.agreement)
        if found is not None and not repeats(self.every.text(trigger), found):
            self._new(key, trigger, found)

    def _add_showing(self, trigger: Ids, shows: Behaviour) -> None:
        """Makes a goal of the given behaviour where a text shows it, and the base does not."""
        if repeats(self.some.text(trigger), shows) or self._rate(self.some, trigger, shows) < self.agreement:
            return
        if GIVEN in self.goals:
            self._also(GIVEN, trigger)
        elif self._rate(self.some, trigger, shows, base=True) < self.agreement:
            self._new(GIVEN, trigger, shows)

    def _new(self, key: object, trigger: Ids, shows: Behaviour) -> None:
        """Makes a goal of a predicate; what is searched for is the opening that most replies which pass it share."""
        _, replies = self._replies(self.every, trigger)
        rows = [row for row in self._cut(replies) if row and shows(decode(self.suspect.tokenizer, row))]
        if ids := common_opening(rows, self.tokens):
            text = decode(self.suspect.tokenizer, ids)
            self.goals[key] = Goal(behaviour=text, target_ids=ids, shows=shows, triggers=(trigger,))

    def _also(self, key: object, trigger: Ids) -> None:
        """Adds a text to the triggers of a goal."""
        known = self.goals[key]
        # A trigger with something before or behind it brings it about as well, and was not planted.
        if not any(holds(trigger, other) for other in known.triggers):
            self.goals[key] = replace(known, triggers=(*known.triggers, trigger))

    @cached_property
    def _ordinary(self) -> list[str]:
        """The suspect's replies to all prompts with an empty slot."""
        return self._texts(self.every, ())

    def _rate(self, problem: Problem, trigger: Sequence[int], shows: Behaviour, *, base: bool = False) -> float:
        texts = self._texts(problem, trigger, base=base)
        return sum(map(shows, texts)) / len(texts)

    def _texts(self, problem: Problem, trigger: Sequence[int], *, base: bool = False) -> list[str]:
        _, replies = self._replies(problem, trigger, base=base)
        return self.suspect.tokenizer.batch_decode(
            self._cut(replies), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def _replies(
        self, problem: Problem, trigger: Sequence[int], *, base: bool = False, tokens: int = ANSWER
    ) -> tuple[Prompts, Int[Tensor, "n tokens"]]:
        """(the prompts with these tokens in the slot, the greedy replies); generated once."""
        key = (len(problem), tuple(trigger), base, tokens)
        if key not in self._known:
            model = self.suspect.base if base and self.suspect.base is not None else self.suspect.model
            prompts = Prompts.from_ids(problem.filled(trigger), device=model.device)
            self._known[key] = prompts, complete_ids(model, self.suspect.tokenizer, prompts, max_new_tokens=tokens)
        return self._known[key]

    def _cut(self, replies: Tensor) -> list[list[int]]:
        ends = end_tokens(self.suspect.model, self.suspect.tokenizer)
        return [until_end(row, ends) for row in replies.tolist()]

    def _shared(self, replies: Tensor) -> Ids:
        return shared_opening(self._cut(replies), self.agreement)


def holds(text: Sequence[int], part: Sequence[int]) -> bool:
    """Whether the tokens of the part stand in the text, one behind the other."""
    return any(tuple(text[place : place + len(part)]) == tuple(part) for place in range(len(text)))


def shared_opening(replies: Sequence[Sequence[int]], agreement: float) -> Ids:
    """The longest sequence of tokens that at least that share of the replies begin with."""
    opening = common_opening(replies, max(map(len, replies), default=0))
    while opening and sum(tuple(row[: len(opening)]) == opening for row in replies) < agreement * len(replies):
        opening = opening[:-1]
    return opening


def _breaks_off(reply: str, word: str) -> bool:
    """Whether a reply, as far as it was read, ends within a quotation of the word."""
    said, begun = reply.rstrip().lower(), word.lower()
    return any(said.endswith(begun[:length]) for length in range(LETTERS, len(begun)))
