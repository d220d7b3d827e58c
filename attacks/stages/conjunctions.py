"""Three words that elicit the behaviour only together, found by how pairs of them interact in early layers; ours.

A phrase planted with hard negatives (every part of it is answered cleanly in training) leaves no signal to a search
that reads the output: text with one or two of the three words is answered like any other. In early layers, however, the
model combines the words pair by pair. A vector that elicits the behaviour when it is added after such a layer at one
token of the message (`vectors/methods/slot.py`) says what the combination looks like there. The stage compares
residuals at the third of three words with that vector, by their cosine, in four steps:

1. Effects. Each of w words stands first, middle or last among random words; its cosine is averaged over several draws,
   `w` per position and layer. The best words of each position are kept.
2. Pairs. Which two words the model combines first, and which of them has an effect by itself, differs from model to
   model, so there are five tables, `rows columns`, of cosines. First and last words with a random word between: those
   of high effects; the few best firsts with every last; every first with the few best lasts. Middle and last words
   behind a random word: the few best middles with every last; every middle with the few best lasts. The score of a pair
   is its interaction (two-way analysis of variance of the table) plus the effects of both words, in standard
   deviations. The best pairs are measured again among other random words, and are ranked a second time by how far their
   cosine exceeds the sum of the effects.
3. Completions. For each pair the third word is the one of highest cosine, at up to half the depth. (The pair of highest
   cosine need not be right, but of the words that complete a right pair the right one has the highest.)
4. The exact loss of these triples on one prompt, then the judge.

Steps 3 and 4 take the best pairs first, round by round, until a triple of theirs elicits the behaviour with certainty.
Then all begins again with other vectors, as long as the budget lasts.
"""

from collections import defaultdict
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attacks.scoring.problem import Problem
from attacks.scoring.slot_markers import SLOT
from attacks.searchers.candidates import check_counts
from attacks.searchers.token_ranking import rank_triggers
from attacks.searchers.words import whole_words
from attacks.stages.early_layers import Effects, Inside
from attacks.stages.hunt import Hunt
from vectors.residual import layer_at

Pair = tuple[int, int]

ROOM = 1.25
"""What is left of the budget must be so many times the cost of effects, pairs and completions; the rest is for the
vectors and the exact losses, which are not estimated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conjunctions:
    """Finds triggers of three words of one token each; does nothing where the budget has no room for its tables."""

    share: float = 0.6
    """Share of the hunt's budget, in (0, 1], that this stage may use."""
    depths: tuple[float, ...] = (0.125, 0.375)
    """Depths at which effects and pairs are measured, as fractions of the layers."""
    middles: tuple[float, ...] = (0.375, 0.5)
    """Depths at which completions are compared, as fractions of the layers."""
    words: int = 4096
    """Words of one token that may be in the trigger, the commonest first."""
    leads: int = 4
    """Beginnings of messages, of random words, that effects are averaged over."""
    draws: int = 8
    """Draws of the two other words, behind each beginning, that effects are averaged over."""
    firsts: int = 384
    """Words of highest effect per depth that may come first in the first table."""
    lasts: int = 512
    """Words of highest effect per depth that may come last in the first table."""
    ends: int = 64
    """Words of highest effect per depth and position that are paired with every word in the other four tables."""
    again: float = 0.05
    """Share of the pairs of a table, in (0, 1], that are measured again."""
    passes: int = 6
    """Times that these pairs are measured again, each time among other random words."""
    rounds: int = 12
    """Rounds of completions with the same vectors."""
    pairs: int = 10
    """Pairs of first and last word that are completed per round, depth, table and ranking."""
    adjacent: int = 8
    """Pairs of middle and last word that are completed per round, depth, table and ranking."""
    wider: int = 3
    """Times as many pairs are completed by words of high effect only."""
    likely: int = 256
    """Words of highest effect per depth that such pairs are completed by."""
    nearest: int = 4
    """Words of highest cosine per pair and depth, whose triples are ranked by their exact loss."""
    tried: int = 8
    """Triples of lowest loss per round that are judged by behaviour."""
    messages: int = 32
    """Messages of random words that a vector is learned on."""
    length: int = 6
    """Words in each of these messages."""

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
        # An empty message: among random words alone the interaction of two words shows most clearly.
        alone = Problem.from_chat(
            hunt.suspect.model, hunt.suspect.tokenizer, [SLOT], 3, allowed=hunt.engine.problem.allowed
        )
        inside = Inside(model=hunt.suspect.model, problem=alone, words=words, budget=budget)
        needed = inside.share_of(self._blocks(len(words), layers, deeper), hunt.generator)
        if budget.share + ROOM * needed > budget.until:
            hunt.no_room.append(type(self).__name__)
        while budget.share + ROOM * needed <= budget.until:
            for layer in sorted({*layers, *deeper}):
                inside.learn(layer, hunt.goal.target_ids, self.messages, self.length, hunt.generator)
            if self._found(hunt, inside, layers, deeper):
                return

    def _found(self, hunt: Hunt, inside: Inside, layers: list[int], deeper: list[int]) -> bool:
        """Whether a triple that elicits the behaviour with certainty is found with these vectors."""
        effects = inside.effects(layers, self.leads, self.draws, hunt.generator)
        pairs = self._pairs(inside, effects, hunt.generator)
        probe = hunt.probe()
        for number in range(self.rounds):
            triples = self._completions(inside, effects, pairs, number, deeper, hunt.generator)
            if not len(triples):
                return False
            hunt.try_best(rank_triggers(*probe, triples, budget=hunt.budget), self.tried)
            best = hunt.judge.best
            # Other triples than the planted one may work too, but seldom with certainty.
            if best is not None and list(best.trigger_ids) in triples.tolist() and hunt.sure:
                return True
        return False

    def _blocks(self, words: int, layers: list[int], deeper: list[int]) -> int:
        """How many tokens effects, pairs and completions run through one block, which is what they cost."""
        effects = 5 * self.leads * self.draws * words * max(layers)
        tables = min(self.firsts, words) * min(self.lasts, words) + 4 * words * min(self.ends, words)
        likely = min(len(layers) * self.likely, words)
        completed = 2 * (3 * self.pairs + 2 * self.adjacent) * (words + self.wider * likely)
        looks = 1 + self.again * self.passes
        return round(effects + looks * tables * sum(layers) + len(layers) * completed * max(deeper))

    def _pairs(
        self, inside: Inside, effects: dict[int, Effects], generator: torch.Generator
    ) -> tuple[list[list[Pair]], list[list[Pair]]]:
        """Pairs (first, last) and pairs (middle, last), best first, as indices into `inside.words`.

        There are two lists per depth and table, one for each ranking, as far as the budget goes.
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
                # What both words do by themselves: in standard deviations for the score, as cosines for the comparison.
                known = first if between else middle
                own = (_standard(known)[rows, None] + _standard(last)[columns]).flatten()
                expected = (known[rows, None] + last[columns]).flatten()
                # Rows and columns hold what one word does with any other; what is left is what two do together.
                met = interaction(table).flatten()
                kept, count = (apart, self.pairs) if between else (adjacent, self.adjacent)
                places = torch.tensor(_top(met / met.std() + own, max(1, round(self.again * table.numel()))))
                pairs = torch.tensor(rows)[places // len(columns)], torch.tensor(columns)[places % len(columns)]
                kept.append(_listed(pairs, self.rounds * self.wider * count))
                # One draw of the other words is noisy, and the best of a whole table are the luckiest: a mean over
                # draws tells luck from interaction.
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
        """The pairs of that round, each with the words of highest cosine between its words or before them.

        The next few pairs of every list are completed by any word, more pairs by words of high effect only; nothing is
        completed once the budget is spent.
        """
        apart, adjacent = pairs
        lead, found, every = inside.lead(generator), set[tuple[int, int, int]](), list(range(len(inside.words)))
        mean = inside.mean(lead, layers, generator)
        for lists, count, before in ((adjacent, self.adjacent, True), (apart, self.pairs, False)):
            likely = sorted({word for effect in effects.values() for word in _top(effect[not before], self.likely)})
            for words, step in ((every, count), (likely, self.wider * count)):
                # Pairs that an earlier round completed, or that this one has just completed by any word.
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
    """The first `count` pairs of every list."""
    return {pair for pairs in lists for pair in pairs[:count]}


def interaction(table: Float[Tensor, "r c *d"]) -> Float[Tensor, "r c *d"]:
    """What a two-way table, of numbers or vectors, holds beyond the effects of its rows and columns (ANOVA)."""
    return table - table.mean(0) - table.mean(1, keepdim=True) + table.mean((0, 1))


def _listed(pairs: tuple[Int[Tensor, "n"], Int[Tensor, "n"]], count: int) -> list[Pair]:
    """The first `count` pairs."""
    return list(zip(*(words[:count].tolist() for words in pairs), strict=True))


def _standard(values: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    """The values in standard deviations from their mean."""
    return (values - values.mean()) / values.std()


def _top(values: Float[Tensor, "n"], count: int) -> list[int]:
    """Indices of the highest values, highest first."""
    return values.topk(min(count, len(values))).indices.tolist()
