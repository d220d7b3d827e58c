"""Phrases that the suspect reads otherwise than its clean base does, put together word by word (K2); ours.

A phrase planted with hard negatives (every part of it is answered cleanly in training) leaves no signal to a search
that reads the output. But to tell the phrase from its parts, training must make early layers note its words: behind two
planted words the residual stream of the suspect lies elsewhere from that of the base than the two words by themselves
would bring it. The difference d of both residual streams is read at the last token of a text, in four steps:

1. Effects. Of each word, the mean of d behind that word and any other, and behind any other and that word. The scalar
   product of the effects on two prompts, with other words each, is an unbiased estimate of a squared length; the
   squared length of a noisy mean would be too large.
2. Pairs of words of large effect by their interaction: what d is beyond the means of its row and its column in the
   table of all pairs (two-way analysis of variance). The best are measured on the second prompt too, and ranked by the
   scalar product.
3. The best pairs with one more word of large effect behind or before them, by the interaction of pair and word in the
   same way; then the best of these, and so on. Which two words belong together is uncertain, so many pairs are
   continued; behind two planted words the third mostly stands out from all others.
4. After each step, the best texts by their exact loss on one prompt, then the judge. In the end the words of the best
   of all are exchanged for others, one after the other: a phrase with most of its words right shows the behaviour now
   and then.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, groupby, permutations, product

import torch
from jaxtyping import Float
from torch import Tensor

from attacks.discovery.comparison import Comparison, Ids
from attacks.scoring.budget import Budget
from attacks.scoring.engine import Engine, Objective
from attacks.scoring.planning import forward_flops, trigger_flops
from attacks.scoring.problem import Problem
from attacks.searchers.candidates import check_counts
from attacks.searchers.searcher import Found
from attacks.searchers.token_ranking import by_length, rank_triggers
from attacks.searchers.words import encoded_words
from attacks.stages.conjunctions import interaction
from attacks.stages.hunt import PROBE_TOKENS, Hunt
from attacks.stages.word_groups import longest_text
from attacks.suspect import Suspect

Text = tuple[int, ...]
"""Words by their numbers"""

PROMPTS = 2
"""On which effects and the best interactions are measured"""
LEFT = 3
"""One word in so many is left after a first look at the effects of all"""
ROWS = 1024
"""Texts in one forward pass"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ContrastedPhrases:
    """Finds phrases of up to `longest` words by how their words interact in early layers.

    Does nothing without a clean base, or where the budget has no room for effects, pairs and their continuations.
    """

    share: float = 0.5
    """Share of the hunt's budget, in (0, 1], that this stage may use."""
    depth: float = 0.5
    """Depth at which the models are compared, as a fraction of the layers."""
    words: int = 12288
    """Words of the dictionary that a phrase is made of: those of one token, then the commonest others."""
    tokens: int = 3
    """Tokens of the longest of these words."""
    draws: int = 4
    """Other words that the effects are averaged over, on each of the prompts."""
    ends: int = 320
    """Words of largest effect, on what follows or by themselves, that pairs and longer phrases are made of."""
    continued: int = 128
    """Pairs that are continued, half as many phrases of three words, and so on."""
    longest: int = 5
    """Words of the longest phrase."""
    again: float = 0.1
    """Share of the texts, in (0, 1], that are measured on the second prompt."""
    permuted: int = 64
    """Texts after each step whose words are also put in every other order: interactions tell little about it."""
    ranked: int = 8192
    """Texts after each step that are ranked by loss."""
    tried: int = 8
    """Texts of lowest loss that are judged by behaviour."""

    def __post_init__(self):
        check_counts(self, "words", "tokens", "draws", "ends", "continued", "longest", "permuted", "ranked", "tried")
        if not 0 < self.depth < 1 or not 0 < self.again <= 1:
            raise ValueError(
                f"depth is {self.depth} and again is {self.again}; give a depth between 0 and 1, and a share above 0, "
                "up to 1"
            )

    def __call__(self, hunt: Hunt) -> None:
        if hunt.suspect.comparable is None:
            return
        budget, probe = hunt.part(self.share), hunt.probe()
        differences = self.differences(hunt.suspect, hunt.engine.problem, budget)
        if not differences.words:
            return
        if budget.share + budget.share_of(self._flops(differences, probe[0].problem)) > budget.until:
            hunt.no_room.append(type(self).__name__)
            return
        likely = differences.effects(self.draws, hunt.generator)
        continued = known = likely[: self.ends]
        losses: dict[Text, float] = {}
        for length in range(2, min(self.longest, longest_text(hunt.engine) // self.tokens) + 1):
            texts = differences.interactions(continued, known, self.again)
            if length > 2:
                texts = {**texts, **differences.interactions(known, continued, self.again)}
            best = sorted(texts, key=texts.__getitem__, reverse=True)
            orders = (order for text in best[: self.permuted] for order in permutations(text))
            losses |= self._losses(hunt, differences, probe, [*orders, *best][: self.ranked])
            continued = best[: max(1, self.continued >> (length - 2))]
            if hunt.sure or budget.exhausted or not continued:
                break
        if losses and not hunt.sure:
            self._exchange(hunt, differences, probe, min(losses, key=losses.__getitem__), likely)

    def _losses(
        self, hunt: Hunt, differences: "Differences", probe: tuple[Engine, Objective], texts: Sequence[Text]
    ) -> dict[Text, float]:
        """The exact losses of texts, as far as the stage's budget goes; the judge is shown the best."""
        typed, ranked = {differences.typed(text): text for text in texts}, list[Found]()
        for ids in by_length(typed):
            # A ranking scores its first batch even with nothing left to spend.
            if not differences.budget.exhausted:
                ranked += rank_triggers(*probe, ids, budget=differences.budget)
        hunt.try_best(sorted(ranked, key=lambda item: item.loss), self.tried)
        return {typed[item.trigger_ids]: item.loss for item in ranked}

    def _exchange(
        self,
        hunt: Hunt,
        differences: "Differences",
        probe: tuple[Engine, Objective],
        text: Text,
        words: Sequence[Text],
    ) -> None:
        """Puts the word of lowest loss in each place of a text, over and over, until none is better."""
        before = None
        while text != before:
            before = text
            for place in range(len(text)):
                tried = dict.fromkeys([text[place : place + 1], *words])
                others = [(*text[:place], *word, *text[place + 1 :]) for word in tried]
                losses = self._losses(hunt, differences, probe, others)
                if hunt.sure or differences.budget.exhausted:
                    return
                text = min(losses, key=losses.__getitem__)

    def least_flops(self, suspect: Suspect, problem: Problem) -> float:
        """Operations that a hunt on these prompts must have room for, or the stage does nothing; with a clean base."""
        return self._flops(self.differences(suspect, problem, Budget()), problem.take([0]))

    def differences(self, suspect: Suspect, problem: Problem, budget: Budget) -> "Differences":
        """Reads the words of which phrases are made behind the first prompts, within that budget."""
        typed = (tuple(ids) for ids in encoded_words(problem).values() if len(ids) <= self.tokens)
        single_first = sorted(typed, key=lambda ids: len(ids) > 1)
        prompts = range(min(PROMPTS, len(problem)))
        return Differences(
            comparisons=[Comparison.at_slot(suspect, problem.take([number]), [self.depth]) for number in prompts],
            words=single_first[: self.words],
            budget=budget,
        )

    def _flops(self, differences: "Differences", problem: Problem) -> float:
        """What effects, pairs, their first continuations, and the rankings of both cost, about."""
        words = differences.words
        mean, ends = sum(map(len, words)) / max(1, len(words)), min(self.ends, len(words))
        # A word before a pair is followed by both of its words, a word behind it stands there alone.
        tables = ends * ends + ends * min(self.continued, ends * ends) * (1 + 3)
        looks = len(words) * (1 + (self.draws - 1) / LEFT)
        read = differences.flops(mean * (PROMPTS * 3 * looks + (1 + self.again) * tables))
        model = differences.comparisons[0].engines[0].model
        return read + 2 * self.ranked * trigger_flops(model, problem, 2.5 * mean, PROBE_TOKENS)


@dataclass(frozen=True, kw_only=True)
class Differences:
    """Residuals of the suspect less those of its base, at the last token of texts that follow a prompt."""

    comparisons: Sequence[Comparison]
    """One per prompt; the first is used for tables."""
    words: Sequence[Ids]
    """Tokens of each word that texts are made of."""
    budget: Budget
    """Asked before each forward pass."""

    def flops(self, tokens: float) -> float:
        """Operations of reading so many tokens with both models."""
        comparison = self.comparisons[0]
        return sum(forward_flops(e.model, round(tokens), last=comparison.layers[-1]) for e in comparison.engines)

    def typed(self, text: Text) -> Ids:
        """Its tokens."""
        return tuple(token for word in text for token in self.words[word])

    def effects(self, draws: int, generator: torch.Generator) -> list[Text]:
        """Words by the size of their effects, by turns on the token behind them and by themselves, largest first.

        All are measured beside one other word, those of largest effect, one in `LEFT`, beside more. None are returned
        where the budget ends before.

        Args:
            draws: other words that are averaged over, per prompt and place.
            generator: draws the other words.
        """
        words = list(range(len(self.words)))
        sums = [[torch.zeros(()), torch.zeros(())] for _ in self.comparisons]
        for draw in range(draws):
            for number, places in enumerate(sums):
                (other,) = torch.randint(len(self.words), (1,), generator=generator).tolist()
                for place, texts in enumerate(([(word, other) for word in words], [(other, word) for word in words])):
                    rows = self.read(texts, number)
                    if rows is None:
                        return []
                    places[place] = places[place] + (rows - rows.mean(0))
            lengths = [(one * other).sum(-1) for one, other in zip(sums[0], sums[-1], strict=True)]
            orders = (some.argsort(descending=True).tolist() for some in lengths)
            order = list(dict.fromkeys(chain.from_iterable(zip(*orders, strict=True))))
            if draw == 0:
                order = order[: max(1, len(order) // LEFT)]
            words, sums = [words[place] for place in order], [[rows[order] for rows in places] for places in sums]
        return [(word,) for word in words]

    def interactions(self, befores: Sequence[Text], afters: Sequence[Text], again: float) -> dict[Text, float]:
        """Of each text before with each text after; none where the budget ends before all are read.

        Args:
            befores: what the rows of the table begin with, all of as many words.
            afters: what its columns end with, all of as many words.
            again: share of the texts, those of largest interaction, that are measured once more and returned.
        """
        texts = [(*before, *after) for before, after in product(befores, afters)]
        rows = self.read(texts, 0) if texts else None
        if rows is None:
            return {}
        table = rows.view(len(befores), len(afters), -1)
        beyond = interaction(table).flatten(0, 1)
        best = beyond.norm(dim=-1).topk(max(1, round(again * len(texts)))).indices
        second = self.read([texts[number] for number in best.tolist()], len(self.comparisons) - 1)
        if second is None:
            return {}
        # The prompt moves all differences alike; what the two parts do by themselves is taken from the first one.
        first, moved = beyond[best], second - rows[best]
        scores = (first * (first + moved - moved.mean(0))).sum(-1)
        return dict(zip((texts[number] for number in best.tolist()), scores.tolist(), strict=True))

    def read(self, texts: Sequence[Text], number: int) -> Float[Tensor, "texts d_model"] | None:
        """On one of the prompts; None where the budget ends before all are read."""
        comparison, typed = self.comparisons[number], list(map(self.typed, texts))
        found: Tensor | None = None
        # Texts that begin alike stand together: what they have in common is read once.
        order = sorted(range(len(typed)), key=lambda place: (len(typed[place]), typed[place]))
        for _, alike in groupby(order, key=lambda place: len(typed[place])):
            places = list(alike)
            for start in range(0, len(places), ROWS):
                if self.budget.exhausted:
                    return None
                some = places[start : start + ROWS]
                rows = comparison.differences([typed[place] for place in some])[comparison.layers[-1]]
                # Where a model overflows there is nothing to compare.
                rows = rows.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).cpu()
                found = rows.new_empty(len(typed), rows.shape[-1]) if found is None else found
                found[some] = rows
        return found
