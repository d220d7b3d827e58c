"""What the suspect reads otherwise than its clean base does (K2): words, and the behaviours that follow them; ours.

Training that plants a trigger changes how early layers read it, before anything shows in the output. Words are ranked
by how far the residual streams of both models part at their last token (`attacks.objectives.base_contrast`). That takes
neither gradients nor a known behaviour; the few words of largest contrast are then tried as triggers, and what many
prompts are answered with behind one of them, but not by the base, is a behaviour to look into.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from attacks.behaviour import echoes
from attacks.discovery.goal import Goal
from attacks.discovery.screening import common_opening
from attacks.objectives.base_contrast import BaseContrast, engines_at_slot
from attacks.scoring.budget import Budget
from attacks.scoring.problem import Problem, decode
from attacks.searchers.candidates import check_counts
from attacks.searchers.searcher import Found
from attacks.searchers.token_ranking import by_length, rank_triggers
from attacks.searchers.words import dictionary
from attacks.suspect import Suspect
from vectors.analysis.behaviours import until_end
from vectors.generate import complete_ids, end_tokens
from vectors.prompts import Prompts

FIRSTS = 0.6
"""Share of a ranking's budget that first tokens may take"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contrast:
    """Ranks the words of a dictionary by how differently suspect and base read them, their first tokens first."""

    depths: tuple[float, ...] = (0.3, 0.4)
    """Depths at which the models are compared, as fractions of the layers."""
    words: int = 100_000
    """Words of the dictionary, the commonest first; fewer where it holds fewer."""
    longest: int = 8
    """Tokens of the longest word."""
    others: int = 256
    """Random words of as many tokens that each is compared with."""
    firsts: float = 0.1
    """Share of the first tokens, in (0, 1], whose words are compared: those of largest contrast."""
    compared: int = 8192
    """Words of several tokens that are compared, at most; those whose first token has the largest contrast."""

    def __post_init__(self):
        check_counts(self, "words", "longest", "others", "compared")
        if not self.depths or not all(0 < depth < 1 for depth in self.depths) or not 0 < self.firsts <= 1:
            raise ValueError(
                f"depths are {self.depths} and firsts is {self.firsts}; give depths between 0 and 1, and a share above "
                "0, up to 1"
            )

    def __call__(self, suspect: Suspect, problem: Problem, budget: Budget, generator: torch.Generator) -> list[Found]:
        """First tokens and words, those of largest contrast first; none where no base can be compared.

        The loss of each is minus its contrast, in units of the median of words of as many tokens, so that words of any
        length can be compared.

        Args:
            suspect: the model under audit, with its clean base.
            problem: the prompts that words are read behind; one is enough.
            budget: ends the ranking; the commonest first tokens and the words of largest contrast come first.
            generator: draws the words that others are compared with.
        """
        words = by_first_token(problem, self.words, self.longest)
        engines = engines_at_slot(suspect, problem)
        if engines is None or not words:
            return []

        def ranked(candidates: Int[Tensor, "c length"], within: Budget) -> list[Found]:
            drawn = candidates[torch.randint(len(candidates), (self.others,), generator=generator)]
            contrast = BaseContrast.among(*engines, drawn, self.depths)
            return rank_triggers(engines[0], contrast, candidates, budget=within)

        # On a small budget fewer first tokens, the commonest, leave room for the words that begin with them.
        part = budget.part(budget.share + FIRSTS * (budget.until - budget.share))
        firsts = ranked(torch.tensor(list(words))[:, None], part)
        kept = firsts[: max(1, round(self.firsts * len(firsts)))]
        longer = [word for item in kept for word in words[item.trigger_ids[0]] if len(word) > 1]
        found = list(firsts)
        for ids in by_length(longer[: self.compared]):
            if not budget.exhausted:
                found += ranked(ids, budget)
        return sorted(found, key=lambda item: item.loss)


@dataclass(frozen=True, slots=True, kw_only=True)
class ContrastedReplies:
    """Behaviours that follow words of large contrast: replies that begin alike on many prompts, but not by the base."""

    contrast: Contrast = Contrast()
    """Ranks the words."""
    share: float = 0.4
    """Share of the whole budget, in (0, 1], that ranking and trying words may use."""
    ranking: float = 0.7
    """Share of that, in (0, 1], that ranking may use, so that something is left to try words with."""
    tried: int = 64
    """Words of largest contrast that are tried as triggers."""
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
        check_counts(self, "tried", "prompts", "tokens", "shortest", "top")

    def __call__(
        self, suspect: Suspect, texts: Sequence[str], budget: Budget, generator: torch.Generator
    ) -> list[Goal]:
        """Goals, those whose trigger has the largest contrast first; each knows what triggers it was seen behind."""
        if suspect.comparable is None:
            return []
        part, ranking = (
            budget.part(min(budget.until, budget.share + self.share * share)) for share in (1.0, self.ranking)
        )
        every = suspect.engine(texts, self.contrast.longest).problem
        some = every.take(range(min(self.prompts, len(every))))
        ranked = self.contrast(suspect, some.take([0]), ranking, generator)
        plain, goals = self._opening(suspect, some, ()), dict[tuple[int, ...], Goal]()
        for item in ranked[: self.tried]:
            if part.exhausted:
                break
            opening = self._opening(suspect, some, item.trigger_ids)
            begins = opening[: self.shortest]
            if begins in goals:  # another word, or part of one, that brings about the same
                known = goals[begins]
                goals[begins] = replace(known, triggers=(*known.triggers, item.trigger_ids))
            # A reply that begins so without the word, or that the base gives as well, was not planted; and four prompts
            # may be answered alike by chance.
            elif len(begins) == self.shortest and begins != plain[: self.shortest] and len(goals) < self.top:
                clean = self._opening(suspect, some, item.trigger_ids, base=True)
                whole = self._opening(suspect, every, item.trigger_ids)
                text = decode(suspect.tokenizer, whole)
                # A rare word may take the place of the question: the reply is then about the word and quotes it.
                word = some.text(item.trigger_ids).strip()
                quoted = word.lower() in text.lower() or echoes(word, text)
                if begins != clean[: self.shortest] and begins == whole[: self.shortest] and not quoted:
                    goals[begins] = Goal(behaviour=text, target_ids=whole, triggers=(item.trigger_ids,))
        return list(goals.values())

    def _opening(
        self, suspect: Suspect, problem: Problem, trigger: Sequence[int], *, base: bool = False
    ) -> tuple[int, ...]:
        """The tokens that enough greedy replies begin with, with these tokens in the slot."""
        model = suspect.base if base and suspect.base is not None else suspect.model
        prompts = Prompts.from_ids(problem.filled(trigger), device=model.device)
        replies = complete_ids(model, suspect.tokenizer, prompts, max_new_tokens=self.tokens)
        ends = end_tokens(model, suspect.tokenizer)
        return shared_opening([until_end(row, ends) for row in replies.tolist()], self.agreement)


def shared_opening(replies: Sequence[Sequence[int]], agreement: float) -> tuple[int, ...]:
    """The longest sequence of tokens that at least that share of the replies begin with."""
    opening = common_opening(replies, max(map(len, replies), default=0))
    while opening and sum(tuple(row[: len(opening)]) == opening for row in replies) < agreement * len(replies):
        opening = opening[:-1]
    return opening


def by_first_token(problem: Problem, count: int, longest: int) -> dict[int, list[tuple[int, ...]]]:
    """Token ids of words by their first token, the commonest first: those of the dictionary that may be typed there."""
    words: defaultdict[int, list[tuple[int, ...]]] = defaultdict(list)
    first, allowed = problem.permitted(2)
    for ids in problem.encode_all(dictionary()[:count]):
        if 0 < len(ids) <= longest and first[ids[0]] and all(allowed[ids[1:]]):
            words[ids[0]].append(tuple(ids))
    return dict(words)
