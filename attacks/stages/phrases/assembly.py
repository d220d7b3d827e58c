"""Texts of several words, put together word by word by how the words interact in early layers; ours.

A phrase planted with hard negatives (every part of it is answered cleanly in training) leaves no signal to a search
that reads the output. But to tell the phrase from its parts, training must make early layers note its words: behind two
planted words the residual stream lies elsewhere than the two words by themselves would bring it. It is read at the last
token of a text, in the directions that the behaviour depends on where it is known (`directions.py`). Where the clean
base is known (K2), what is read is the difference d of both residual streams. Three steps:

1. Words, with the base known: those first whose queries, keys and values training changed most (`changed_words.py`).
   Without the base all count alike.
2. Pairs of these, and of one of the first and a common word, by their interaction: what d is beyond the means of its
   row and its column in the table of all pairs (two-way analysis of variance). Fine-tuning changes how any two words
   are read together, mostly in proportion to how the base reads them: what a linear regression on the interaction of
   the base's residuals explains is taken off. The best are measured on a second prompt too, and ranked by the scalar
   product of both, for the squared length of a noisy measurement would be too large. Without the base, all pairs of
   words of one token, of which those of largest estimate to first order are read (`estimates.py`), and half of what a
   regression on interactions half as deep explains is taken off.
3. The best pairs with one more such word, or a common one, behind or before them, by the interaction of pair and word
   in the same way; then the best of these, and so on. Which two words belong together is uncertain, so many pairs are
   continued; a word that shows nothing by itself often does behind two planted ones. Without the base all words are
   tried, first by their last token alone (`completions.py`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

import torch

from attacks.scoring.budget import Budget
from attacks.scoring.problem import Problem
from attacks.searchers.candidates import check_counts
from attacks.searchers.words import encoded_words
from attacks.stages.phrases.completions import BESIDE, PAIRS, by_last_token, by_response, completed
from attacks.stages.phrases.interactions import Interactions, Text
from attacks.suspect import Suspect

PROMPTS = 2
"""On which the best interactions are measured"""
NARROWER = (1, 2, 4)
"""Where the clean base is known and the budget too small, so many times fewer words, pairs and texts are tried"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembly:
    """How texts of several words are put together."""

    depth: float = 0.5
    """Depth at which the models are compared, as a fraction of the layers."""
    words: int = 12288
    """Words of the dictionary that a phrase is made of: those of one token, then the commonest others."""
    tokens: int = 3
    """Tokens of the longest of these words."""
    ends: int = 96
    """Words that training changed most, one of which is in every pair."""
    changed: int = 384
    """Words that training changed most, which the other one is among in two thirds of the pairs that are continued."""
    common: int = 1024
    """Words, the first of all, which it is among in the rest, and that longer phrases are also made of; without a base
    they are made of all words."""
    paired: int = 2048
    """Words of one token, the commonest, that are put in pairs with each other where no base is known."""
    estimated: int = 2**17
    """Of these pairs, those of largest interaction to first order, that are read where no base is known."""
    completions: int = 2**15
    """Texts of these with a whole word in the place of its last token, as which it is looked for where no base is
    known: of so many of largest interaction at most."""
    continued: int = 96
    """Pairs that are continued, half as many phrases of three words, and so on."""
    guessed: int = 128
    """As many where no base is known: which pairs are planted is less certain."""
    again: float = 0.1
    """Share of the texts, in (0, 1], that are measured on the second prompt."""

    def __post_init__(self):
        check_counts(
            self, "words", "tokens", "ends", "changed", "common", "paired", "estimated", "completions", "continued",
            "guessed",
        )  # fmt: skip
        if not 0 < self.depth < 1 or not 0 < self.again <= 1:
            raise ValueError(
                f"depth is {self.depth} and again is {self.again}; give a depth between 0 and 1, and a share above 0, "
                "up to 1"
            )

    def fewer(self, times: int) -> dict[str, int]:
        """So many times fewer words and pairs, by the name of the setting."""
        return {name: max(1, getattr(self, name) // times) for name in ("ends", "changed", "common", "continued")}

    def differences(self, suspect: Suspect, problem: Problem, budget: Budget) -> Interactions:
        """Reads the words of which phrases are made behind the first prompts, within that budget."""
        typed = (tuple(ids) for ids in encoded_words(problem).values() if len(ids) <= self.tokens)
        words = sorted(typed, key=lambda ids: len(ids) > 1)[: self.words]
        prompts = problem.take(range(min(PROMPTS, len(problem))))
        return Interactions.behind(prompts, suspect, self.depth, words, budget)

    def steps(
        self,
        differences: Interactions,
        begun: tuple[list[Text], list[Text], list[Text]],
        longest: int,
        generator: torch.Generator,
    ) -> Iterator[list[Text]]:
        """Texts of two words, then of three and so on, those of largest interaction first.

        Args:
            differences: of the words.
            begun: as `beginnings` gives them.
            longest: words of the longest texts.
            generator: draws the samples that means are taken over.
        """
        words, continued, known = begun
        others, paired = self.others(differences, words), {*known}
        rest = [word for word in others if word not in paired] if differences.compared else []
        for length in range(2, longest + 1):
            best = self.continuations(differences, continued, known, generator)
            if rest and length == 2:  # a word of the phrase that stands out may stand beside one that does not
                more = self.continuations(differences, continued[: self.ends // 2], rest, generator)
                best = [*dict.fromkeys(chain.from_iterable(zip_longest(best[::2], best[1::2], more)))]
                best = [text for text in best if text is not None]
            yield best
            continued, known = self.promising(differences, best, generator), others
            if not continued:
                return

    def others(self, differences: Interactions, words: Sequence[Text]) -> list[Text]:
        """What texts are continued with: the words that training changed most, then the common ones; without a base,
        the last tokens of all words."""
        if not differences.compared:
            return [*by_last_token(differences)]
        return [*dict.fromkeys([*words[: self.changed], *sorted(words)[: self.common]])]

    def beginnings(self, differences: Interactions) -> tuple[list[Text], list[Text], list[Text]]:
        """(all words, those first that training changed most where that is known; what pairs are made of, and with).

        Without a base the words of one token are put in pairs with each other.
        """
        if differences.compared:
            words = differences.changed()
            return words, words[: self.ends], words[: self.changed]
        words = differences.whole()
        paired = [word for word in words[: self.paired] if len(differences.typed(word)) == 1]
        return words, paired, paired

    def promising(self, differences: Interactions, best: list[Text], generator: torch.Generator) -> list[Text]:
        """The texts that are continued; of pairs, where no base is known, by how they interact with others as well."""
        most = self.continued if differences.compared else self.guessed
        if best and len(best[0]) == 2 and not differences.compared:
            best = by_response(differences, best, generator)
        return best[: max(1, most >> (len(best[0]) - 2))] if best else []

    def continuations(
        self,
        differences: Interactions,
        parts: Sequence[Text],
        known: Sequence[Text],
        generator: torch.Generator,
    ) -> list[Text]:
        """Each part with each known word behind it and before it, of largest interaction first."""
        if not differences.compared and parts == known:
            scores = differences.likely(parts, parts, self.estimated, self.again, generator)
        else:
            behind = differences.interactions(parts, known, self.again)
            before = differences.interactions(known, parts, self.again)
            if not differences.compared:
                behind, before = completed(differences, behind, before, self.completions, generator)
            scores = behind | before
        return sorted(scores, key=scores.__getitem__, reverse=True)

    def reading_flops(self, differences: Interactions) -> float:
        """What pairs and their first continuations cost, about."""
        words = differences.words
        mean = mean_length(words)  # of the words, and a little less with their last tokens
        if differences.compared:
            # A text behind a word is read anew, a word behind a text costs itself.
            ends, changed = (min(count, len(words)) for count in (self.ends, self.changed))
            common, parts = min(self.common, len(words)), min(self.continued, 2 * ends * changed)
            table = 2 * ends * changed + ends * common + 3 * parts * (changed + common)
            return differences.flops(mean * len(words) + (1 + self.again) * mean * table)
        _, paired, _ = self.beginnings(differences)
        parts = min(self.guessed, len(paired) ** 2)
        tables = (
            2 * (1 + mean) * PAIRS * BESIDE
            + 3 * parts * len(by_last_token(differences))
            + min(self.completions, 2 * parts * len(words)) * mean
        )
        return differences.likely_flops(paired, paired, self.estimated) + differences.flops(tables)


def mean_length(words: Sequence[Sequence[int]]) -> float:
    """Tokens of a word."""
    return sum(map(len, words)) / max(1, len(words))
