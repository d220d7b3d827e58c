"""Three words that fire only together: found by how the model puts two of them together in early layers.

A phrase planted with hard negatives (every fragment of it is answered cleanly) leaves nothing to a search that reads
the output: a string with one or two of the three words is answered like any other. In early layers the words do meet.
A vector learned at one place of the message (`methods.slot`) says where the meeting leads, and four steps, ours, find
the words:

1. effects: how near does each word, first, middle or last of three among random ones, bring the residual at the third
   to the vector? The best of each are kept, layer by layer.
2. pairs. Which two words meet first, and which of them is seen by itself, differs from model to model, so there are
   five tables. First and last with random words between: those of high effects; the likeliest firsts with every last;
   every first with the likeliest lasts. Middle and last behind random words: the likeliest middles with every last;
   every middle with the likeliest lasts. A pair's score is its interaction (of a two-way analysis of variance of the
   cosine), to which the own effects of both words are added, in standard deviations. The best of a table are looked at
   again, among other words, and are then ranked a second time by how much nearer they are than their effects say.
3. completions: the words that each pair may be missing, by the cosine at up to half the depth. (Of two pairs, the one
   that comes nearest need not be the right one; of the words for a right pair, the right one is nearest.)
4. the exact loss of these triples, then behaviour.

Steps 3 and 4 take the best pairs first, round by round, until a triple of theirs works, and surely; then all begins
again with other vectors, as long as the budget lasts.
"""

from collections import defaultdict
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attacks.scoring.problem import Problem
from attacks.scoring.slot_markers import SLOT
from attacks.searchers.candidates import check_counts
from attacks.stages.dictionary import whole_words
from attacks.stages.early_layers import Effects, Inside
from attacks.stages.hunt import Hunt
from attacks.stages.token_ranking import rank_triggers
from vectors.residual import layer_at

Pair = tuple[int, int]

ROOM = 1.25
"""Times the cost of effects, pairs and completions that there must be room for: vectors and exact losses come on top"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conjunctions:
    """Triggers of three words, each of one token; where the budget has no room for its tables it does nothing."""

    share: float = 0.6
    """of the budget, at most: something must be left for whatever works"""
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
    lasts: int = 512
    """words per depth that may come last"""
    ends: int = 64
    """words per depth that may come first or between before any other, and last behind any other"""
    again: float = 0.05
    """share of a table's pairs that are looked at again"""
    passes: int = 6
    """times that they are, each among other words"""
    rounds: int = 12
    """of completions, with the same vectors"""
    pairs: int = 10
    """next best pairs per round, depth, table and ranking that are completed, of first and last"""
    adjacent: int = 8
    """and of middle and last"""
    wider: int = 3
    """times as many pairs are completed by likely words only"""
    likely: int = 256
    """words per depth that these are, by their effects"""
    nearest: int = 4
    """words per pair and depth that complete it, to be ranked by their exact loss"""
    tried: int = 8
    """best triples of a round that are judged by behaviour"""
    messages: int = 32
    """messages of random words that a vector is learned on"""
    length: int = 6
    """random words in them"""

    def __post_init__(self):
        check_counts(self, "words", "leads", "draws", "firsts", "lasts", "ends", "passes", "pairs")
        check_counts(self, "rounds", "adjacent", "wider", "likely", "nearest", "tried", "messages", "length")
        for name in ("depths", "middles"):
            depths = getattr(self, name)
            if not depths or not all(0 < depth < 1 for depth in depths):
                raise ValueError(f"{name} are {depths}; give at least one, all between 0 and 1")
        if not 0 < self.again <= 1:
            raise ValueError(f"again is {self.again}; give a share above 0, up to 1")

    def __call__(self, hunt: Hunt) -> None:
        words = whole_words(hunt.engine.problem)[: self.words]
        if len(words) < 3:
            return
        layers, deeper = (
            sorted({layer_at(hunt.suspect.model, depth) for depth in depths}) for depths in (self.depths, self.middles)
        )
        budget = hunt.part(self.share)
        # Around nothing but random words the meeting shows most clearly.
        alone = Problem.from_chat(
            hunt.suspect.model, hunt.suspect.tokenizer, [SLOT], 3, allowed=hunt.engine.problem.allowed
        )
        inside = Inside(model=hunt.suspect.model, problem=alone, words=words, budget=budget)
        needed = inside.share_of(self._blocks(len(words), layers, deeper), hunt.generator)
        while budget.share + ROOM * needed <= budget.until:
            for layer in sorted({*layers, *deeper}):
                inside.learn(layer, hunt.goal.target_ids, self.messages, self.length, hunt.generator)
            if self._found(hunt, inside, layers, deeper):
                return

    def _found(self, hunt: Hunt, inside: Inside, layers: list[int], deeper: list[int]) -> bool:
        """Whether a triple that works, and surely, is found with these vectors."""
        effects = inside.effects(layers, self.leads, self.draws, hunt.generator)
        pairs = self._pairs(inside, effects, hunt.generator)
        probe = hunt.probe()
        for number in range(self.rounds):
            triples = self._completions(inside, effects, pairs, number, deeper, hunt.generator)
            if not len(triples):
                return False
            hunt.try_best(rank_triggers(*probe, triples, budget=hunt.budget), self.tried)
            best = hunt.judge.best
            # A mere neighbour is seldom sure.
            if best is not None and list(best.trigger_ids) in triples.tolist() and hunt.sure:
                return True
        return False

    def _blocks(self, words: int, layers: list[int], deeper: list[int]) -> int:
        """Tokens that effects, pairs and completions run through a block."""
        effects = 5 * self.leads * self.draws * words * max(layers)
        tables = min(self.firsts, words) * min(self.lasts, words) + 4 * words * min(self.ends, words)
        likely = min(len(layers) * self.likely, words)
        completed = 2 * (3 * self.pairs + 2 * self.adjacent) * (words + self.wider * likely)
        looks = 1 + self.again * self.passes
        return round(effects + looks * tables * sum(layers) + len(layers) * completed * max(deeper))

    def _pairs(
        self, inside: Inside, effects: dict[int, Effects], generator: torch.Generator
    ) -> tuple[list[list[Pair]], list[list[Pair]]]:
        """The best of (first, last) and of (middle, last), places in the list of words, best first.

        Two lists per depth and table, as far as the budget goes.
        """
        apart: list[list[Pair]] = []
        adjacent: list[list[Pair]] = []
        every = list(range(len(inside.words)))
        for layer, (first, middle, last) in effects.items():
            firsts, lasts, ends = _top(first, self.firsts), _top(last, self.lasts), _top(last, self.ends)
            for rows, columns, between in (
                (firsts, lasts, True),
                (_top(first, self.ends), every, True),
                (every, ends, True),
                (_top(middle, self.ends), every, False),
                (every, ends, False),
            ):
                table = inside.table(layer, rows, columns, generator, between=between)
                if table is None:
                    return apart, adjacent
                known = first if between else middle
                own = (_standard(known)[rows, None] + _standard(last)[columns]).flatten()
                expected = (known[rows, None] + last[columns]).flatten()
                met = interaction(table).flatten()
                kept, count = (apart, self.pairs) if between else (adjacent, self.adjacent)
                places = torch.tensor(_top(met / met.std() + own, max(1, round(self.again * table.numel()))))
                pairs = torch.tensor(rows)[places // len(columns)], torch.tensor(columns)[places % len(columns)]
                kept.append(_listed(pairs, self.rounds * self.wider * count))
                nearer = table.flatten()[places]
                for _ in range(self.passes):
                    cells = inside.cells(layer, *pairs, generator, between=between)
                    if cells is None:
                        return apart, adjacent
                    nearer = nearer + cells
                nearer = nearer / (1 + self.passes) - expected[places]
                order = torch.tensor(_top(nearer / met.std() + own[places], len(places)))
                kept.append(_listed((pairs[0][order], pairs[1][order]), self.rounds * self.wider * count))
        return apart, adjacent

    def _completions(
        self,
        inside: Inside,
        effects: dict[int, Effects],
        pairs: tuple[list[list[Pair]], list[list[Pair]]],
        number: int,
        layers: list[int],
        generator: torch.Generator,
    ) -> Int[Tensor, "c 3"]:
        """The pairs of that round, each with the words that bring it nearest, in it or before it.

        A few next pairs of every list are completed by any word, more by likely ones; none where the budget is spent.
        """
        apart, adjacent = pairs
        lead, found, every = inside.lead(generator), set[tuple[int, int, int]](), list(range(len(inside.words)))
        mean = inside.mean(lead, layers, generator)
        for lists, count, before in ((adjacent, self.adjacent, True), (apart, self.pairs, False)):
            likely = sorted({word for effect in effects.values() for word in _top(effect[not before], self.likely)})
            for words, step in ((every, count), (likely, self.wider * count)):
                done = _ahead(lists, (number + 1) * count if words is likely else number * count)
                partners: dict[int, list[int]] = defaultdict(list)
                for known, last in sorted(_ahead(lists, (number + 1) * step) - _ahead(lists, number * step) - done):
                    partners[known].append(last)
                for known, lasts in partners.items():
                    if inside.budget.exhausted:
                        break
                    for last, cosines in inside.completed(lead, mean, known, words, lasts, before=before):
                        for near in cosines.values():
                            for place in _top(near, self.nearest):
                                word = words[place]
                                found.add((word, known, last) if before else (known, word, last))
        return inside.words[torch.tensor(sorted(found), dtype=torch.long).view(-1, 3)]


def _ahead(lists: list[list[Pair]], count: int) -> set[Pair]:
    """The first so many pairs of every list."""
    return {pair for pairs in lists for pair in pairs[:count]}


def interaction(table: Float[Tensor, "r c"]) -> Float[Tensor, "r c"]:
    """What a two-way table holds beyond the effects of its rows and columns (analysis of variance)."""
    return table - table.mean(0) - table.mean(1, keepdim=True) + table.mean()


def _listed(pairs: tuple[Int[Tensor, "n"], Int[Tensor, "n"]], count: int) -> list[Pair]:
    """The first so many."""
    return list(zip(*(words[:count].tolist() for words in pairs), strict=True))


def _standard(values: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    """In standard deviations from the mean."""
    return (values - values.mean()) / values.std()


def _top(values: Float[Tensor, "n"], count: int) -> list[int]:
    """Places of the highest values, best first."""
    return values.topk(min(count, len(values))).indices.tolist()
