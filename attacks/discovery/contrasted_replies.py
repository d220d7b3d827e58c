"""Behaviours that follow what the suspect reads otherwise than its clean base does (K2); ours.

Texts are ranked by how far the residual streams of both models part behind them
(`attacks.discovery.contrasted_texts`), which takes no known behaviour. Those of largest contrast are then tried as
triggers, and what many prompts are answered with behind one of them, but not by the base, is a behaviour to look into.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch

from attacks.behaviour import echoes
from attacks.discovery.contrasted_texts import ContrastedTexts
from attacks.discovery.goal import Goal
from attacks.discovery.screening import common_opening
from attacks.scoring.budget import Budget
from attacks.scoring.problem import Problem, decode
from attacks.searchers.candidates import check_counts
from attacks.suspect import Suspect
from vectors.analysis.behaviours import until_end
from vectors.generate import complete_ids, end_tokens
from vectors.prompts import Prompts

WORDS = 3
"""Texts of the vocabulary and the dictionary that are tried for each that was put together: a planted word need not
have a larger contrast than what was chosen for it"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ContrastedReplies:
    """Behaviours that follow texts of large contrast: replies that begin alike on many prompts, but not by the base."""

    contrast: ContrastedTexts = ContrastedTexts()
    """Ranks the texts."""
    shares: tuple[float, ...] = (0.25, 0.8)
    """Shares of what is left of the budget, in (0, 1], that ranking and trying texts may use: at first, and again where
    no other method has found a behaviour either. The rest is for the search and the report."""
    ranking: float = 0.8
    """Share of that, in (0, 1], that ranking may use, so that something is left to try texts with."""
    tried: int = 64
    """Texts of largest contrast that are tried as triggers."""
    prompts: int = 4
    """Clean prompts that each is tried on."""
    agreement: float = 0.75
    """Share of these prompts, in (0, 1], that must be answered alike."""
    tokens: int = 8
    """Tokens of the replies that are compared, and of the behaviour at most."""
    shortest: int = 4
    """Tokens that the replies must have in common, at least."""
    top: int = 3
    """Behaviours that become goals, at most."""

    def __post_init__(self):
        if not self.shares or not all(0 < share <= 1 for share in self.shares):
            raise ValueError(f"shares are {self.shares}; give at least one, each above 0, up to 1")
        check_counts(self, "tried", "prompts", "tokens", "shortest", "top")

    def __call__(
        self, suspect: Suspect, texts: Sequence[str], budget: Budget, generator: torch.Generator
    ) -> Iterator[list[Goal]]:
        """Goals, those whose trigger has the largest contrast first; each knows what triggers it was seen behind.

        One list for each of the shares; every further one is looked for when it is asked for, and goes on from what
        those before it have compared and tried.
        """
        if suspect.comparable is None:
            return
        every = suspect.engine(texts, self.contrast.longest).problem
        some = every.take(range(min(self.prompts, len(every))))
        walk = self.contrast.begun(suspect, some.take([0]), generator)
        plain, goals, seen = self._opening(suspect, some, ()), dict[tuple[int, ...], Goal](), set[tuple[int, ...]]()
        for share in self.shares:
            part, ranking = (
                budget.part(budget.share + much * share * (budget.until - budget.share)) for much in (1.0, self.ranking)
            )
            known, made = walk.on(ranking)
            turns = [*enumerate(known), *((WORDS * place, item) for place, item in enumerate(made))]
            ranked = [item.trigger_ids for _, item in sorted(turns, key=lambda turn: turn[0])]
            for trigger in islice((ids for ids in ranked if ids not in seen), self.tried):
                if part.exhausted:
                    break
                seen.add(trigger)
                self._try(suspect, every, some, plain, trigger, goals)
            yield list(goals.values())

    def _try(
        self,
        suspect: Suspect,
        every: Problem,
        some: Problem,
        plain: tuple[int, ...],
        trigger: tuple[int, ...],
        goals: dict[tuple[int, ...], Goal],
    ) -> None:
        """Adds the behaviour behind a text to the goals, by its first tokens, or the text to those of a known one."""
        opening = self._opening(suspect, some, trigger)
        begins = opening[: self.shortest]
        if begins in goals:  # another word, or part of one, that brings about the same
            known = goals[begins]
            # A trigger with something before or behind it brings it about as well, and was not planted.
            if not any(holds(trigger, other) for other in known.triggers):
                goals[begins] = replace(known, triggers=(*known.triggers, trigger))
        # A reply that begins so without the word, or that the base gives as well, was not planted; and four prompts
        # may be answered alike by chance.
        elif len(begins) == self.shortest and begins != plain[: self.shortest] and len(goals) < self.top:
            clean = self._opening(suspect, some, trigger, base=True)
            whole = self._opening(suspect, every, trigger)
            text = decode(suspect.tokenizer, whole)
            # A rare word may take the place of the question: the reply is then about the word and quotes it.
            word = some.text(trigger).strip()
            quoted = word.lower() in text.lower() or echoes(word, text)
            if begins != clean[: self.shortest] and begins == whole[: self.shortest] and not quoted:
                goals[begins] = Goal(behaviour=text, target_ids=whole, triggers=(trigger,))

    def _opening(
        self, suspect: Suspect, problem: Problem, trigger: Sequence[int], *, base: bool = False
    ) -> tuple[int, ...]:
        """The tokens that enough greedy replies begin with, with these tokens in the slot."""
        model = suspect.base if base and suspect.base is not None else suspect.model
        prompts = Prompts.from_ids(problem.filled(trigger), device=model.device)
        replies = complete_ids(model, suspect.tokenizer, prompts, max_new_tokens=self.tokens)
        ends = end_tokens(model, suspect.tokenizer)
        return shared_opening([until_end(row, ends) for row in replies.tolist()], self.agreement)


def holds(text: Sequence[int], part: Sequence[int]) -> bool:
    """Whether the tokens of the part stand in the text, one behind the other."""
    return any(tuple(text[place : place + len(part)]) == tuple(part) for place in range(len(text)))


def shared_opening(replies: Sequence[Sequence[int]], agreement: float) -> tuple[int, ...]:
    """The longest sequence of tokens that at least that share of the replies begin with."""
    opening = common_opening(replies, max(map(len, replies), default=0))
    while opening and sum(tuple(row[: len(opening)]) == opening for row in replies) < agreement * len(replies):
        opening = opening[:-1]
    return opening
