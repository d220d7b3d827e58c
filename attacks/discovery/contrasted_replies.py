"""Behaviours that follow what the suspect reads otherwise than its clean base does (K2); ours.

Texts are ranked by how far the residual streams of both models part behind them
(`attacks.discovery.contrasted_texts`), which takes no known behaviour. Those of largest contrast are then tried as
triggers (`attacks.discovery.trials`), and what many prompts are answered with behind one of them, but not by the base,
is a behaviour to look into. Where the user has given a predicate, texts are tried for that.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from attacks.behaviour import Behaviour
from attacks.discovery.comparison import Ids
from attacks.discovery.contrasted_texts import ContrastedTexts
from attacks.discovery.goal import Goal
from attacks.discovery.phrases import proposed
from attacks.discovery.trials import Trials
from attacks.discovery.word_forms import contrasted_forms, in_form
from attacks.scoring.budget import Budget
from attacks.scoring.problem import Problem
from attacks.searchers.candidates import check_counts
from attacks.searchers.words import dictionary
from attacks.stages.phrases.assembly import PROMPTS, Assembly
from attacks.suspect import Suspect

WORDS = 3
"""Texts of the vocabulary and the dictionary that are tried for each that was put together, and for each tag: a planted
word need not have a larger contrast than what was chosen for it"""

FORMING = 0.1
"""Share of what ranking may use at first, in (0, 1], for choosing the form of tags; where that is too little, as on
large models, no tags are tried, and ranking has all"""
PHRASING = 0.4
"""Share of what ranking may use, in (0, 1], for phrases of words that are read together; where that is too little, none
are tried, and ranking has all"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ContrastedReplies:
    """Behaviours that follow texts of large contrast: replies that begin alike on many prompts, but not by the base."""

    contrast: ContrastedTexts = ContrastedTexts()
    """Ranks the texts."""
    shares: tuple[float, ...] = (0.25, 0.8)
    """Shares of what is left of the budget, in (0, 1], that ranking and trying texts may use: at first, and again where
    no other method has found a behaviour either. The rest is for the search and the report."""
    ranking: float = 0.75
    """Share of that, in (0, 1], that ranking may use, so that something is left to try texts with."""
    trying: float = 0.9
    """Share of that, in (0, 1], by the end of which texts are tried; the rest is for describing manners."""
    tried: int = 64
    """Texts of largest contrast that are tried as triggers."""
    formed: int = 8
    """Random words that are tried besides, in the form (capitals, bars, brackets) that is read most differently."""
    assembly: Assembly = Assembly(ends=64, common=128, continued=24)
    """Puts phrases of several words together; of fewer than where the behaviour tells which of many is right."""
    phrases: int = 16
    """Phrases of each number of words that are tried."""
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
    described: int = 4
    """Texts, at most, behind which replies that do not begin alike are searched for a manner that they share."""

    def __post_init__(self):
        if not self.shares or not all(0 < share <= 1 for share in self.shares):
            raise ValueError(f"shares are {self.shares}; give at least one, each above 0, up to 1")
        check_counts(self, "tried", "formed", "phrases", "prompts", "tokens", "shortest", "top", "described")

    def __call__(
        self,
        suspect: Suspect,
        texts: Sequence[str],
        budget: Budget,
        generator: torch.Generator,
        shows: Behaviour | None = None,
    ) -> Iterator[list[Goal]]:
        """Goals, those whose trigger has the largest contrast first; each knows what triggers it was seen behind.

        One list for each of the shares; every further one is looked for when it is asked for, and goes on from what
        those before it have compared and tried. With a predicate `shows` only its behaviour becomes a goal.
        """
        if suspect.comparable is None:
            return
        every = suspect.engine(texts, self.contrast.longest).problem
        walk = self.contrast.begun(suspect, every.take([0]), generator)
        same = {name: getattr(self, name) for name in ("agreement", "tokens", "shortest", "top", "described")}
        trials = Trials(suspect=suspect, every=every, few=self.prompts, shows=shows, **same)
        seen, phrases = set[Ids](), list[Ids]()
        for share in self.shares:
            began, left = budget.share, share * (budget.until - budget.share)
            ranking, trying, part = (budget.part(began + much * left) for much in (self.ranking, self.trying, 1.0))
            tags = [] if seen else self._tags(suspect, walk.problem, ranking.of_rest(FORMING), generator)
            phrases = phrases or self._phrases(suspect, every, ranking.of_rest(PHRASING), generator)
            known, made = ([item.trigger_ids for item in kind] for kind in walk.on(ranking))
            others = [(WORDS * place, ids) for kind in (made, tags) for place, ids in enumerate(kind)]
            others += enumerate(phrases)
            most = self.tried + len(tags) + len({*phrases} - seen)
            ranked = [ids for _, ids in sorted([*enumerate(known), *others], key=lambda turn: turn[0])]
            for trigger in islice((ids for ids in ranked if ids not in seen), most):
                if trying.exhausted:
                    break
                seen.add(trigger)
                trials.add(trigger)
            trials.describe(part)
            yield list(trials.goals.values())

    def _tags(self, suspect: Suspect, problem: Problem, budget: Budget, generator: torch.Generator) -> list[Ids]:
        """Some words in the form that both models read most differently: one tag often fires like the planted one."""
        some = torch.randperm(len(dictionary()), generator=generator)[: self.formed].tolist()
        forms = contrasted_forms(suspect, problem, budget, generator)
        return in_form(problem, forms[0], [dictionary()[number] for number in some]) if forms else []

    def _phrases(self, suspect: Suspect, every: Problem, budget: Budget, generator: torch.Generator) -> list[Ids]:
        """Phrases whose words are read together most differently."""
        some = every.take(range(min(PROMPTS, len(every))))
        return proposed(suspect, some, budget, self.phrases, generator, self.assembly)
