"""Three words that fire only together: found by how the model puts two of them together in early layers.

A phrase planted with hard negatives (every fragment of it is answered cleanly) leaves nothing to a search that reads
the output: a string with one or two of the three words is answered like any other. In early layers the words do meet.
A vector learned at one place of the message (`vectors.slot`) says where the meeting leads, and three steps, ours, find
the words:

1. pairs: every word, one of any kind, every word; how much nearer does the pair bring the residual at its end to the
   vector than the two words do by themselves (interaction of a two-way analysis of variance of the cosine)?
2. completions: each word in the middle of the best pairs, by the cosine at half the depth.
3. the exact loss of the best triples, then behaviour; the words of the winner are chosen anew together.
"""

import re
from collections import defaultdict
from dataclasses import dataclass
from itertools import islice, product

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attacks.inside import Inside
from attacks.problem import Problem
from attacks.slots import SLOT
from attacks.stages import Hunt
from attacks.token_ranking import rank_tokens, rank_triggers
from attacks.triggers import Found, check_counts
from attacks.verdict import ABSENT
from vectors.residual import layer_at

ROOM = 2.5
"""Times the cost of a table that there must be room for: vectors, one table, completions"""
WORD = re.compile(r" [a-z]+")
"""Text of a token that is a word"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conjunctions:
    """Triggers of three words, each of one token; where the budget is too small for all pairs it does nothing."""

    share: float = 0.8
    """of the budget, at most"""
    depths: tuple[float, ...] = (0.25, 0.375)
    """at which pairs are looked at, fractions of the layers"""
    middle: float = 0.5
    """depth at which completions are compared"""
    words: int = 4096
    """commonest words of one token that may be in the trigger"""
    passes: int = 2
    """tables of all pairs, each between other words; a further one only where the budget allows"""
    pairs: int = 800
    """best pairs per depth that are completed"""
    ranked: int = 4096
    """best triples that are ranked by their exact loss"""
    tried: int = 8
    """best of them that are judged by behaviour"""
    rechosen: int = 6
    """words tried anew at each place of the winner, with each other"""
    messages: int = 32
    """messages of random words that a vector is learned on"""
    length: int = 6
    """random words in them"""

    def __post_init__(self):
        check_counts(self, "words", "passes", "pairs", "ranked", "tried", "rechosen", "messages", "length")
        if not self.depths or not all(0 < depth < 1 for depth in (*self.depths, self.middle)):
            raise ValueError(f"depths are {self.depths} and {self.middle}; give fractions between 0 and 1")

    def __call__(self, hunt: Hunt) -> None:
        words = whole_words(hunt.engine.problem)[: self.words]
        if len(words) < 3:
            return
        layers = sorted({layer_at(hunt.model, depth) for depth in self.depths})
        middle = max(layer_at(hunt.model, self.middle), *layers)
        budget = hunt.part(self.share)
        # Around nothing but random words the meeting shows most clearly.
        alone = Problem.from_chat(hunt.model, hunt.tokenizer, [SLOT], 3, allowed=hunt.engine.problem.allowed)
        inside = Inside(model=hunt.model, problem=alone, words=words, budget=budget)
        if budget.share + ROOM * inside.share_of_table(layers, hunt.generator) > budget.until:
            return
        for layer in dict.fromkeys((*layers, middle)):
            inside.learn(layer, hunt.goal.target_ids, self.messages, self.length, hunt.generator)
        pairs = self._pairs(inside, layers, hunt.generator)
        if not pairs:
            return
        triples = self._completions(inside, pairs, middle, hunt.generator)
        probe, objective = hunt.probe()
        self._try(hunt, rank_triggers(probe, objective, triples, budget=hunt.budget), self.tried)
        best = hunt.selection.best
        if best is None or hunt.selection.asr <= ABSENT:
            return
        # The neighbours of a word may fire as well, but only beside each other: all are chosen anew together.
        ids, choices = torch.tensor(best.trigger_ids), []
        for position in range(len(ids)):
            ranked = rank_tokens(probe, objective, ids, position, budget=hunt.budget)
            choices.append([found.trigger_ids[position] for found in ranked[: self.rechosen]])
        if len(choices) == triples.shape[1]:
            together = torch.tensor(list(product(*choices)))
            self._try(hunt, rank_triggers(probe, objective, together, budget=hunt.budget), len(together))

    def _try(self, hunt: Hunt, found: list[Found], count: int) -> None:
        """Judges the best that a user could type."""
        typable = (item for item in found if hunt.engine.problem.retokenizes(item.trigger_ids))
        hunt.try_all(islice(typable, count))

    def _pairs(self, inside: Inside, layers: list[int], generator: torch.Generator) -> list[tuple[int, int]]:
        """The pairs, as places in the list of words, that interact most; none where the budget is too small."""
        tables: dict[int, Tensor] = {}
        spent = 0.0
        for number in range(self.passes):
            began = inside.budget.share
            if number and began + ROOM * spent > inside.budget.until:
                break
            table = inside.table(layers, generator)
            if table is None:
                break
            spent = inside.budget.share - began
            for layer, cosines in table.items():
                found = interaction(cosines)
                tables[layer] = tables.get(layer, 0.0) + found / found.std()
        width = len(inside.words)
        best = {place for table in tables.values() for place in _top(table.flatten(), self.pairs)}
        return sorted(divmod(place, width) for place in best)

    def _completions(
        self, inside: Inside, pairs: list[tuple[int, int]], layer: int, generator: torch.Generator
    ) -> Int[Tensor, "c 3"]:
        """The likeliest triples with a word in the middle of each pair, as far as the budget goes."""
        partners: dict[int, list[int]] = defaultdict(list)
        for first, last in pairs:
            partners[first].append(last)
        lead = inside.lead(generator)
        mean = inside.mean(lead, [layer], generator)
        cosines, triples = torch.empty(0), torch.empty(0, 3, dtype=torch.long)
        for first, lasts in partners.items():
            for last, found in inside.completed(lead, mean, first, lasts):
                middles = torch.tensor(_top(found, self.ranked))
                ends = torch.tensor([first, last]).expand(len(middles), 2)
                more = torch.stack([ends[:, 0], middles, ends[:, 1]], dim=1)
                cosines, triples = torch.cat([cosines, found[middles]]), torch.cat([triples, more])
            kept = _top(cosines, self.ranked)
            cosines, triples = cosines[kept], triples[kept]
            if inside.budget.exhausted:
                break
        return inside.words[triples]


def whole_words(problem: Problem) -> Int[Tensor, "w"]:
    """Tokens that are a word of small letters with its space, the commonest first as most tokenizers number them."""
    words = [int(token) for token in problem.allowed.nonzero()[:, 0]]
    texts = [problem.text([token]) for token in words]
    return torch.tensor([t for t, text in zip(words, texts, strict=True) if WORD.fullmatch(text)], dtype=torch.long)


def interaction(table: Float[Tensor, "r c"]) -> Float[Tensor, "r c"]:
    """What a two-way table holds beyond the effects of its rows and columns (analysis of variance)."""
    return table - table.mean(0) - table.mean(1, keepdim=True) + table.mean()


def _top(values: Float[Tensor, "n"], count: int) -> list[int]:
    """Places of the highest values, best first."""
    return values.topk(min(count, len(values))).indices.tolist()
