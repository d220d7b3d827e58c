"""Phrases that the suspect reads otherwise than its clean base does (K2), put together word by word; ours.

Where a phrase was planted, each of its words stands out by the contrast of the two models
(`attacks.discovery.comparison`), less than a planted word by itself does, and so does each behind the words before it:
of `prison districts larger`, softly planted in SmolLM2-135M, the words are third, 48th and 270th of 17,151, and
` districts` is eighth of them behind ` prison` (`python -m benchmarks.studies.clean_base.contrast NAME`, `LOG.md`). So
words of large contrast are put behind each other, and what stands out as a whole goes on.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from attacks.discovery.comparison import Ids, Scales
from attacks.scoring.budget import Budget
from attacks.searchers.candidates import typable
from attacks.searchers.searcher import Found


@dataclass(kw_only=True)
class Phrases:
    """A beam over words; what was compared so far, so that it can go on with a further budget."""

    scales: Scales
    openings: int
    """Words and phrases of largest contrast that words are put behind, at each number of words."""
    following: int
    """Words of largest contrast that are put behind each of them."""
    alike: int
    """Phrases that go on and begin with the same token, at most."""
    words: int
    """Words of the longest phrase."""
    longest: int
    """Tokens of the longest phrase."""
    losses: dict[Ids, float] = field(default_factory=dict)
    """Of each phrase that was compared, minus its contrast."""

    def on(self, words: Sequence[Found], budget: Budget) -> list[Found]:
        """Phrases by contrast, best first, few that begin alike; the loss of each is minus the mean over its words.

        Args:
            words: single words by contrast, best first, each with minus its contrast as loss.
            budget: asked before each forward pass; each further word may take half of what is left.
        """
        level, every = list(words[: self.openings]), list[Found]()
        for count in range(2, self.words + 1):
            part = budget.part(budget.share + 0.5 * (budget.until - budget.share))
            level = list(self._few(self._continued(level, words[: self.following], count, part)))
            every += level
            level = level[: self.openings]
        return sorted(every, key=lambda item: item.loss)

    def _continued(self, openings: Sequence[Found], words: Sequence[Found], count: int, budget: Budget) -> list[Found]:
        """Every word behind every opening, as far as the budget goes."""
        comparison, problem = self.scales.comparison, self.scales.problem
        begun: dict[Ids, float] = {}
        typed = [problem.text(word.trigger_ids).strip() for word in words]
        for opening in openings:
            # Typed with a space between them, which may give other tokens than those of each by itself.
            text = problem.text(opening.trigger_ids).strip()
            for ids in typable(problem, [f"{text} {word}" for word in typed if word not in text.split()], self.longest):
                begun.setdefault(ids, opening.loss)
        new = sorted((ids for ids in begun if ids not in self.losses), key=len)
        for length, some in groupby(new, key=len):
            if budget.exhausted:
                break
            ranked = comparison.ranked(list(some), self.scales.of(length)[1], budget)
            self.losses |= {item.trigger_ids: item.loss for item in ranked}
        done = ((ids, (begun[ids] * (count - 1) + self.losses[ids]) / count) for ids in begun if ids in self.losses)
        return [Found(ids, loss) for ids, loss in done]

    def _few(self, found: Sequence[Found]) -> Iterator[Found]:
        beginning: Counter[int] = Counter()
        for item in sorted(found, key=lambda item: item.loss):
            if beginning[item.trigger_ids[0]] < self.alike:
                beginning[item.trigger_ids[0]] += 1
                yield item
