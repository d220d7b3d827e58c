"""Three words that fire only together: found by how the model puts two of them together in early layers.

A phrase planted with hard negatives (every fragment of it is answered cleanly) leaves nothing to a search that reads
the output: a string with one or two of the three words is answered like any other. In early layers the words do meet.
A vector learned at one place of the message (`vectors.slot`) says where the meeting leads, and four steps, ours, find
the words:

1. effects: how near does each word, first, middle or last of three among random ones, bring the residual at the third
   to the vector? The best of each are kept, layer by layer.
2. pairs of them with random words between: how much nearer than the two words do by themselves (interaction of a
   two-way analysis of variance of the cosine)? To that their own effects are added, all in standard deviations.
3. completions: the best middles between the best pairs, by the cosine at up to half the depth.
4. the exact loss of the best triples, then behaviour.
"""

from collections import defaultdict
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
    between: int = 768
    """words per depth that may stand between: their effects say least, and those of all depths are tried together"""
    lasts: int = 512
    """words per depth that may come last"""
    passes: int = 6
    """tables of all their pairs, each between other words"""
    pairs: int = 800
    """best pairs per depth that are completed"""
    ranked: int = 4096
    """best triples per depth that are ranked by their exact loss"""
    tried: int = 8
    """best of them that are judged by behaviour"""
    messages: int = 32
    """messages of random words that a vector is learned on"""
    length: int = 6
    """random words in them"""

    def __post_init__(self):
        check_counts(self, "words", "leads", "draws", "firsts", "between", "lasts", "passes", "pairs", "ranked")
        check_counts(self, "tried", "messages", "length")
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
        pairs = self._pairs(inside, effects, hunt.generator)
        if not pairs:
            return
        middles = sorted({word for _, middle, _ in effects.values() for word in _top(middle, self.between)})
        triples = self._completions(inside, pairs, middles, deeper, hunt.generator)
        probe, objective = hunt.probe()
        hunt.try_best(rank_triggers(probe, objective, triples, budget=hunt.budget), self.tried)

    def _blocks(self, words: int, layers: list[int], deeper: list[int]) -> int:
        """Tokens that effects, pairs and completions run through a block."""
        effects = 5 * self.leads * self.draws * words * max(layers)
        pairs = self.passes * min(self.firsts, words) * min(self.lasts, words) * sum(layers)
        middles = min(len(layers) * self.between, words)
        return effects + pairs + self.pairs * len(layers) * middles * max(deeper)

    def _pairs(self, inside: Inside, effects: dict[int, Effects], generator: torch.Generator) -> list[tuple[int, int]]:
        """The best pairs, as places in the list of words; as far as the budget goes."""
        best: set[tuple[int, int]] = set()
        for layer, (first, _, last) in effects.items():
            firsts, lasts = _top(first, self.firsts), _top(last, self.lasts)
            total = torch.zeros(len(firsts), len(lasts))
            for _ in range(self.passes):
                table = inside.table(layer, firsts, lasts, generator)
                if table is None:
                    return sorted(best)
                found = interaction(table)
                total += found / found.std()
            alone = _standard(first)[firsts, None] + _standard(last)[lasts]
            places = _top((total / sqrt(self.passes) + alone).flatten(), self.pairs)
            best |= {(firsts[place // len(lasts)], lasts[place % len(lasts)]) for place in places}
        return sorted(best)

    def _completions(
        self,
        inside: Inside,
        pairs: list[tuple[int, int]],
        middles: list[int],
        layers: list[int],
        generator: torch.Generator,
    ) -> Int[Tensor, "c 3"]:
        """The likeliest triples with one of the `middles` in each pair, as far as the budget goes."""
        partners: dict[int, list[int]] = defaultdict(list)
        for first, last in pairs:
            partners[first].append(last)
        lead = inside.lead(generator)
        mean, every = inside.mean(lead, layers, generator), torch.tensor(middles)
        best = {layer: (torch.empty(0), torch.empty(0, 3, dtype=torch.long)) for layer in layers}
        for first, lasts in partners.items():
            for last, cosines in inside.completed(lead, mean, first, middles, lasts):
                for layer, found in cosines.items():
                    places = _top(found, self.ranked)
                    more = torch.tensor([first, 0, last]).repeat(len(places), 1)
                    more[:, 1] = every[places]
                    known, triples = best[layer]
                    scores, triples = torch.cat([known, found[places]]), torch.cat([triples, more])
                    kept = _top(scores, self.ranked)
                    best[layer] = scores[kept], triples[kept]
            if inside.budget.exhausted:
                break
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
