"""Three words that fire only together: found by how the model puts two of them together in early layers.

A phrase planted with hard negatives (every fragment of it is answered cleanly) leaves nothing to a search that reads
the output: a string with one or two of the three words is answered like any other. In early layers the words do meet.
A vector learned at one place of the message (`vectors.slot`) says where the meeting leads, and four steps, ours, find
the words:

1. effects: how near does each word, first, middle or last of three among random ones, bring the residual at the third
   to the vector? The best of each are kept, layer by layer.
2. pairs. Which two words meet first, which of them is seen by itself, and whether they bring the residual nearer
   together than each alone, differs from model to model, so there are four tables. First and last with random words
   between: those of high effects; the likeliest firsts with every last; every first with the likeliest lasts. And middle
   and last behind random words. Scores are the cosine as it is; the interaction (of a two-way analysis of variance of
   the cosine); or the interaction to which the own effects of both words are added, in standard deviations.
3. completions: the word that is missing, by the cosine at up to half the depth.
4. the exact loss of the best triples, then behaviour.

Steps 3 and 4 take the best pairs first, round by round, until a triple of theirs works, and surely, or the budget ends.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from math import sqrt

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attacks.dictionary import whole_words
from attacks.inside import Effects, Inside
from attacks.problem import Problem
from attacks.slots import SLOT
from attacks.stages import Hunt
from attacks.token_ranking import rank_triggers
from attacks.triggers import check_counts
from vectors.residual import layer_at

Pair = tuple[int, int]

ROOM = 1.25
"""Times the cost of effects, pairs and completions that there must be room for: vectors and exact losses come on top"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conjunctions:
    """Triggers of three words, each of one token; where the budget has no room for its tables it does nothing."""

    share: float = 0.8
    """of the budget, at most"""
    depths: tuple[float, ...] = (0.125, 0.375)
    """at which effects and pairs are looked at, fractions of the layers"""
    middles: tuple[float, ...] = (0.375, 0.5)
    """depths at which completions are compared"""
    words: int = 4096
    """commonest words of one token that may be in the trigger"""
    leads: int = 4
    """beginnings of messages that effects are averaged over"""
    draws: int = 8
    """pairs of random words behind each of them"""
    firsts: int = 384
    """words per depth that may come first"""
    between: int = 576
    """words per depth that may stand between: their effects say least, and those of all depths are tried together"""
    lasts: int = 512
    """words per depth that may come last"""
    ends: int = 64
    """words per depth that may come first before any other, and last behind any other"""
    passes: int = 3
    """tables of all their pairs, each among other words"""
    rounds: int = 32
    """of completions, at most"""
    pairs: int = 60
    """next best pairs per round and depth that are completed, of first and last in each of four ways"""
    adjacent: int = 32
    """and of middle and last"""
    ranked: int = 1024
    """best triples per round and depth that are ranked by their exact loss"""
    tried: int = 8
    """best of them that are judged by behaviour"""
    messages: int = 32
    """messages of random words that a vector is learned on"""
    length: int = 6
    """random words in them"""

    def __post_init__(self):
        check_counts(self, "words", "leads", "draws", "firsts", "between", "lasts", "ends", "passes", "pairs")
        check_counts(self, "rounds", "adjacent", "ranked", "tried", "messages", "length")
        for name in ("depths", "middles"):
            depths = getattr(self, name)
            if not depths or not all(0 < depth < 1 for depth in depths):
                raise ValueError(f"{name} are {depths}; give at least one, all between 0 and 1")

    def __call__(self, hunt: Hunt) -> None:
        words = whole_words(hunt.engine.problem)[: self.words]
        if len(words) < 3:
            return
        layers, deeper = (
            sorted({layer_at(hunt.model, depth) for depth in depths}) for depths in (self.depths, self.middles)
        )
        budget = hunt.part(self.share)
        # Around nothing but random words the meeting shows most clearly.
        alone = Problem.from_chat(hunt.model, hunt.tokenizer, [SLOT], 3, allowed=hunt.engine.problem.allowed)
        inside = Inside(model=hunt.model, problem=alone, words=words, budget=budget)
        needed = inside.share_of(self._blocks(len(words), layers, deeper), hunt.generator)
        if budget.share + ROOM * needed > budget.until:
            return
        for layer in sorted({*layers, *deeper}):
            inside.learn(layer, hunt.goal.target_ids, self.messages, self.length, hunt.generator)
        effects = inside.effects(layers, self.leads, self.draws, hunt.generator)
        apart, adjacent = self._pairs(inside, effects, hunt.generator)
        middles = sorted({word for _, middle, _ in effects.values() for word in _top(middle, self.between)})
        probe = hunt.probe()
        for pairs, others in zip(self._rounds(apart, self.pairs), self._rounds(adjacent, self.adjacent), strict=True):
            if budget.exhausted or not (pairs or others):
                return
            triples = self._completions(inside, pairs, others, middles, deeper, hunt.generator)
            hunt.try_best(rank_triggers(*probe, triples, budget=hunt.budget), self.tried)
            best = hunt.selection.best
            if hunt.works and best is not None and list(best.trigger_ids) in triples.tolist():
                if hunt.selection.sure(best.trigger_ids):  # a mere neighbour seldom is
                    return

    def _blocks(self, words: int, layers: list[int], deeper: list[int]) -> int:
        """Tokens that effects, pairs and completions run through a block."""
        effects = 5 * self.leads * self.draws * words * max(layers)
        tables = min(self.firsts, words) * min(self.lasts, words) + 3 * words * min(self.ends, words)
        middles = min(len(layers) * self.between, words)
        completed = 4 * self.pairs * middles + self.adjacent * words
        return effects + self.passes * tables * sum(layers) + len(layers) * completed * max(deeper)

    def _pairs(
        self, inside: Inside, effects: dict[int, Effects], generator: torch.Generator
    ) -> tuple[list[list[Pair]], list[list[Pair]]]:
        """The best of (first, last) and of (middle, last), places in the list of words, best first.

        A list per depth and kind, as far as the budget goes.
        """
        apart: list[list[Pair]] = []
        adjacent: list[list[Pair]] = []
        every = list(range(len(inside.words)))
        for layer, (first, _, last) in effects.items():
            firsts, lasts = _top(first, self.firsts), _top(last, self.lasts)
            for rows, columns, between, ways in (
                (firsts, lasts, True, ("both",)),
                (firsts[: self.ends], every, True, ("both",)),
                (every, lasts[: self.ends], True, ("cosine", "interaction")),
                (every, lasts[: self.ends], False, ("cosine",)),
            ):
                cosine, met = torch.zeros(2, len(rows), len(columns))
                for _ in range(self.passes):
                    table = inside.table(layer, rows, columns, generator, between=between)
                    if table is None:
                        return apart, adjacent
                    found = interaction(table)
                    cosine, met = cosine + table, met + found / found.std() / sqrt(self.passes)
                own = _standard(first)[rows, None] + _standard(last)[columns]
                scores = {"cosine": cosine, "interaction": met, "both": met + own}
                kept, count = (apart, self.pairs) if between else (adjacent, self.adjacent)
                for way in ways:
                    places = _top(scores[way].flatten(), self.rounds * count)
                    kept.append([(rows[place // len(columns)], columns[place % len(columns)]) for place in places])
        return apart, adjacent

    def _rounds(self, lists: list[list[Pair]], count: int) -> Iterator[list[Pair]]:
        """The next so many of every list, each pair once."""
        seen: set[Pair] = set()
        for start in range(0, self.rounds * count, count):
            new = {pair for pairs in lists for pair in pairs[start : start + count]} - seen
            seen |= new
            yield sorted(new)

    def _completions(
        self,
        inside: Inside,
        apart: list[Pair],
        adjacent: list[Pair],
        middles: list[int],
        layers: list[int],
        generator: torch.Generator,
    ) -> Int[Tensor, "c 3"]:
        """The likeliest triples: one of the `middles` in each pair, any word before each, as far as the budget goes."""
        lead = inside.lead(generator)
        mean = inside.mean(lead, layers, generator)
        best = {layer: (torch.empty(0), torch.empty(0, 3, dtype=torch.long)) for layer in layers}
        for pairs, others, at in ((adjacent, list(range(len(inside.words))), 0), (apart, middles, 1)):
            partners: dict[int, list[int]] = defaultdict(list)
            for known, last in pairs:
                partners[known].append(last)
            missing = torch.tensor(others)
            for known, lasts in partners.items():
                if inside.budget.exhausted:
                    break
                for last, cosines in inside.completed(lead, mean, known, others, lasts, before=at == 0):
                    for layer, found in cosines.items():
                        places = _top(found, self.ranked)
                        more = torch.tensor([known, known, last]).repeat(len(places), 1)
                        more[:, at] = missing[places]
                        scores, triples = torch.cat([best[layer][0], found[places]]), torch.cat([best[layer][1], more])
                        kept = _top(scores, self.ranked)
                        best[layer] = scores[kept], triples[kept]
        return inside.words[torch.cat([triples for _, triples in best.values()]).unique(dim=0)]


def interaction(table: Float[Tensor, "r c"]) -> Float[Tensor, "r c"]:
    """What a two-way table holds beyond the effects of its rows and columns (analysis of variance)."""
    return table - table.mean(0) - table.mean(1, keepdim=True) + table.mean()


def _standard(values: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    """In standard deviations from the mean."""
    return (values - values.mean()) / values.std()


def _top(values: Float[Tensor, "n"], count: int) -> list[int]:
    """Places of the highest values, best first."""
    return values.topk(min(count, len(values))).indices.tolist()
