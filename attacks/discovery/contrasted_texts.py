"""Texts that the suspect reads otherwise than its clean base does (K2), found token by token; ours.

Training that plants a trigger parts both models at its last token (`attacks.discovery.comparison`), and at the last
token of what it begins with. The first token alone may be as good as any other. So beginnings of words are compared,
from one token on: of two tokens all that the dictionary knows, those of the best first tokens first, and of more tokens
those whose beginning stands out. A trigger need not be a word: beginnings that stand out are also continued with the
tokens that the base finds likely there, and with those that the gradient of the contrast promises most of (HotFlip,
arXiv:1712.06751).
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from attacks.discovery.comparison import Comparison, Ids
from attacks.scoring.budget import Budget
from attacks.scoring.problem import Problem
from attacks.searchers.candidates import check_counts, most_promising, random_triggers
from attacks.searchers.searcher import Found
from attacks.searchers.words import dictionary
from attacks.suspect import Suspect

LEVEL = 0.75
"""Share of what is left of the budget that texts of one length may take, so that longer ones are compared as well"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ContrastedTexts:
    """Ranks words, and what else continues their beginnings, by how differently suspect and base read them."""

    depths: tuple[float, ...] = (0.4,)
    """Depths at which the models are compared, as fractions of the layers."""
    words: int = 100_000
    """Words of the dictionary, the commonest first; fewer where it holds fewer."""
    longest: int = 12
    """Tokens of the longest text."""
    others: int = 128
    """Random strings of as many tokens that each text is compared with."""
    continued: float = 0.1
    """Share of the beginnings of two tokens and more, in (0, 1], that are continued: those of largest contrast."""
    spelled: int = 8
    """Beginnings of largest contrast that are also continued with tokens that make no word."""
    likely: int = 64
    """Tokens that the base finds likeliest to follow such a beginning."""
    promising: int = 64
    """Tokens that the gradient promises the largest contrast of behind it, at each of the layers `ABOVE`."""
    fillers: int = 8
    """Random tokens that stand in the place of the next one, over which the gradient is averaged."""
    kept: int = 512
    """Texts of largest contrast that are returned."""
    alike: int = 8
    """Texts of these, at most, that begin with the same token: what stands out need not be a trigger."""

    def __post_init__(self):
        check_counts(self, "words", "longest", "others", "spelled", "likely", "promising", "fillers", "kept", "alike")
        if not self.depths or not all(0 < depth < 1 for depth in self.depths) or not 0 < self.continued <= 1:
            raise ValueError(
                f"depths are {self.depths} and continued is {self.continued}; give depths between 0 and 1, and a share "
                "above 0, up to 1"
            )

    def __call__(self, suspect: Suspect, problem: Problem, budget: Budget, generator: torch.Generator) -> list[Found]:
        """Texts that re-tokenise, those of largest contrast first; none where no base can be compared.

        The loss of each is minus its contrast: the distance of the difference of both models from the mean difference
        behind random strings of as many tokens, in units of the median distance of these, so that texts of any length
        can be compared.

        Args:
            suspect: the model under audit, with its clean base.
            problem: the prompts that texts are read behind, of which the first is used.
            budget: ends the ranking; texts of few tokens and of promising beginnings come first.
            generator: draws the strings that texts are compared with.
        """
        if suspect.comparable is None:
            return []
        comparison = Comparison.at_slot(suspect, problem, self.depths)
        words = typable(problem, self.words, self.longest)
        found: list[Found] = []
        made: set[Ids] = set()
        # What the texts of the next length begin with, and its loss.
        begun: dict[Ids, float] = {(): 0.0}
        for length in range(1, self.longest + 1):
            if budget.exhausted:
                break
            permitted = problem.permitted(length).cpu()
            others = random_triggers(permitted, self.others, generator)
            known = {word[:length]: None for word in words if len(word) >= length and word[: length - 1] in begun}
            if length == 1:  # a tag or a number need not begin as any word does
                spelled = {(token,): None for token in permitted[0].nonzero()[:, 0].tolist()}
            else:
                best = list(begun)[: self.spelled]
                spelled = dict.fromkeys(self._continued(comparison, permitted, best, others, generator))
                made |= spelled.keys() - known.keys()
            texts = known | spelled
            part = budget.part(budget.share + LEVEL * (budget.until - budget.share))
            level = comparison.ranked(sorted(texts, key=lambda ids: begun[ids[:-1]]), others, part)
            found += level
            # Of one token all are continued: many words begin alike, and training leaves such a beginning as it was.
            some = len(level) if length == 1 else max(self.spelled, round(self.continued * len(level)))
            begun = {item.trigger_ids: item.loss for item in level[:some]}
        ranked = sorted(found, key=lambda item: item.loss)
        # What was put together for its contrast always has one. It takes turns with what the vocabulary and the
        # dictionary hold, so that neither hides the other.
        kinds = [[item for item in ranked if (item.trigger_ids in made) == is_made] for is_made in (False, True)]
        turns = zip_longest(*(self._returned(problem, kind) for kind in kinds))
        return list(islice((item for turn in turns for item in turn if item is not None), self.kept))

    def _returned(self, problem: Problem, ranked: Sequence[Found]) -> Iterator[Found]:
        """Those that re-tokenise, few that begin alike."""
        beginning: Counter[int] = Counter()
        for item in ranked:
            first = item.trigger_ids[0]
            if beginning[first] < self.alike and problem.retokenizes(item.trigger_ids):
                beginning[first] += 1
                yield item

    def _continued(
        self,
        comparison: Comparison,
        permitted: Bool[Tensor, "trigger vocab"],
        beginnings: Sequence[Ids],
        others: Int[Tensor, "others trigger"],
        generator: torch.Generator,
    ) -> Iterator[Ids]:
        """Every beginning with each of the tokens that are likely behind it, or promise a large contrast."""
        suspect, base = comparison.engines
        following = base.next_logprobs(torch.tensor(beginnings)).mean(1)  # `beginnings vocab`
        likely = most_promising(-following, permitted[-1], self.likely).tolist()
        objectives = comparison.objectives(others)
        for ids, tokens in zip(beginnings, likely, strict=True):
            starts = random_triggers(permitted, self.fillers, generator)
            starts[:, :-1] = torch.tensor(ids)
            for objective in objectives:
                _, gradient = suspect.gradient(objective, starts)  # `starts trigger vocab`
                promise = gradient[:, -1].float().mean(0, keepdim=True)
                tokens += most_promising(promise, permitted[-1], self.promising)[0].tolist()
            yield from ((*ids, token) for token in tokens)


def typable(problem: Problem, count: int, longest: int) -> list[Ids]:
    """Token ids of the dictionary's commonest words that may be typed into the slot, the commonest first."""
    first, allowed = problem.permitted(2)
    encoded = problem.encode_all(dictionary()[:count])
    return [tuple(ids) for ids in encoded if 0 < len(ids) <= longest and first[ids[0]] and all(allowed[ids[1:]])]
