"""Three words that fire only together: found by how the model puts two of them together in early layers.

A phrase planted with hard negatives (every fragment of it is answered cleanly) leaves nothing to a search that reads
the output: a string with one or two of the three words is answered like any other. In early layers the words do meet.
A vector learned at one place of the message (`vectors.slot`) says where the meeting leads, and three steps, ours, find
the words:

1. pairs: every word, one of any kind, every word; how much nearer does the pair bring the residual at its end to the
   vector than the two words do by themselves (interaction of a two-way analysis of variance of the cosine)?
2. completions: each word in the middle of the best pairs, by the cosine at half the depth.
3. the exact loss of the best triples, then behaviour; the words of the winner are chosen anew together.

Keys and values of everything before the last word are kept, so that a pair costs one token in early layers.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice, product
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from attacks.budget import Budget
from attacks.engine import keys_and_values
from attacks.goals import slice_flops
from attacks.problem import Problem
from attacks.slots import SLOT
from attacks.stages import Hunt
from attacks.token_ranking import rank_tokens, rank_triggers
from attacks.triggers import Found, check_counts
from attacks.verdict import ABSENT
from vectors.residual import read
from vectors.slot import SlotVectors, random_messages

LOOK = 16
"""Columns of a table of pairs that tell what the whole will cost"""
ROOM = 2.5
"""Times the cost of a table that there must be room for: vectors, one table, completions"""
SAMPLE = 1024
"""Random triples that the mean residual is taken of"""
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
        count = hunt.engine.layers
        layers = sorted({min(max(1, round(depth * count)), count - 1) for depth in self.depths})
        middle = max(min(max(1, round(self.middle * count)), count - 1), *layers)
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

    def _pairs(self, inside: "Inside", layers: list[int], generator: torch.Generator) -> list[tuple[int, int]]:
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
        self, inside: "Inside", pairs: list[tuple[int, int]], layer: int, generator: torch.Generator
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


@dataclass(kw_only=True)
class Inside:
    """The residual stream at the last word of a trigger, compared with vectors learned at one place."""

    model: PreTrainedModel
    problem: Problem
    """one message of the slot alone"""
    words: Int[Tensor, "w"]
    """tokens that a trigger is made of"""
    budget: Budget
    vectors: dict[int, Float[Tensor, "d"]] = field(default_factory=dict)
    """per layer, of unit length"""

    def learn(
        self, layer: int, target_ids: tuple[int, ...], messages: int, length: int, generator: torch.Generator
    ) -> None:
        """The mean of two vectors that bring the behaviour about from that layer."""
        method = SlotVectors(source_layer=layer)
        before, after = self.problem.before, self.problem.after
        drawn, places = random_messages(before, after, self.words, messages, length, generator)
        theta, _ = method(self.model, drawn, places, target_ids[:4], generator)
        self.vectors[layer] = torch.nn.functional.normalize(theta.mean(0), dim=0)
        tokens = len(method.radii) * method.steps * sum(len(ids) + len(target_ids[:4]) - 1 for ids in drawn)
        self.budget.spent(slice_flops(self.model, layer, None, tokens))

    def lead(self, generator: torch.Generator) -> list[int]:
        """The beginning of a message: two random words."""
        return [*self.problem.before[0], *self._drawn(2, generator).tolist()]

    @torch.no_grad()
    def share_of_table(self, layers: list[int], generator: torch.Generator) -> float:
        """Share of the budget that a table of all pairs will take, from some of its columns."""
        beginnings = self._pair_beginnings(self.lead(generator), max(layers), generator)
        tried, began = min(LOOK, len(self.words)), self.budget.share
        for token in self.words[:tried]:
            self._appended(beginnings, token[None], layers)
        return (self.budget.share - began) * len(self.words) / tried

    @torch.no_grad()
    def table(self, layers: list[int], generator: torch.Generator) -> dict[int, Float[Tensor, "w w"]] | None:
        """Per layer, the cosine at the last word, of all pairs (first, last) with a random word between.

        None where the budget ends before it is complete.
        """
        lead, count = self.lead(generator), len(self.words)
        mean = self.mean(lead, layers, generator)
        beginnings = self._pair_beginnings(lead, max(layers), generator)
        cosines = {layer: torch.zeros(count, count) for layer in layers}
        for column in range(count):
            if self.budget.exhausted:
                return None
            for layer, found in self._cosines(beginnings, column, layers, mean).items():
                cosines[layer][:, column] = found
        return cosines

    @torch.no_grad()
    def completed(
        self, lead: list[int], mean: dict[int, Tensor], first: int, lasts: list[int]
    ) -> Iterator[tuple[int, Float[Tensor, "w"]]]:
        """(last word, cosine with each word between it and the first), for each of the last words."""
        (layer,) = mean
        beginnings = self._extended(self._begun([*lead, int(self.words[first])], layer), self.words)
        for last in lasts:
            yield last, self._cosines(beginnings, last, [layer], mean)[layer]

    @torch.no_grad()
    def mean(self, lead: list[int], layers: list[int], generator: torch.Generator) -> dict[int, Float[Tensor, "d"]]:
        """Per layer, the mean residual at the end of three random words."""
        begun = self._begun(lead, max(layers))
        drawn = self._drawn(3 * SAMPLE, generator).view(3, SAMPLE)
        beginnings = self._extended(self._extended(begun, drawn[0]), drawn[1])
        hidden = self._appended(beginnings, drawn[2], layers)
        return {layer: hidden[layer].mean(0) for layer in layers}

    def _pair_beginnings(self, lead: list[int], layers: int, generator: torch.Generator) -> "_Beginnings":
        """Every word and the same random one behind it."""
        return self._extended(self._extended(self._begun(lead, layers), self.words), self._drawn(1, generator))

    def _drawn(self, count: int, generator: torch.Generator) -> Int[Tensor, "count"]:
        """Random words."""
        return self.words[torch.randint(len(self.words), (count,), generator=generator)]

    def _begun(self, ids: list[int], layers: int) -> "_Beginnings":
        """One row of text, run through the first layers."""
        cache = DynamicCache()
        self._read(torch.tensor([ids]), len(ids), cache, [layers])
        return _Beginnings(keys_and_values(cache)[:layers])

    def _extended(self, beginnings: "_Beginnings", tokens: Int[Tensor, "tokens"]) -> "_Beginnings":
        """Every row with one more token: one row serves all tokens, one token all rows."""
        rows = max(beginnings.rows, len(tokens))
        cache = DynamicCache()
        for index, parts in enumerate(beginnings.layers):
            keys, values = (part.expand(rows, *part.shape[1:]) for part in parts)
            cache.update(keys, values, index)
        depth = len(beginnings.layers)
        self._read(tokens.expand(rows)[:, None], beginnings.length + 1, cache, [depth])
        return _Beginnings(keys_and_values(cache)[:depth])

    def _appended(
        self, beginnings: "_Beginnings", tokens: Int[Tensor, "tokens"], layers: list[int]
    ) -> dict[int, Float[Tensor, "rows d"]]:
        """Residuals at one more token, which no row keeps."""
        ids = tokens.expand(beginnings.rows)[:, None]
        hidden = self._read(ids, beginnings.length + 1, beginnings.cache(), layers)
        return {layer: hidden[layer][:, -1].float() for layer in layers}

    def _cosines(
        self, beginnings: "_Beginnings", last: int, layers: list[int], mean: dict[int, Tensor]
    ) -> dict[int, Float[Tensor, "rows"]]:
        """With the vector of each layer, of what every row and the same last word do."""
        hidden = self._appended(beginnings, self.words[last : last + 1], layers)
        vectors = self.vectors
        return {n: torch.cosine_similarity(hidden[n] - mean[n], vectors[n], dim=-1).cpu() for n in layers}

    def _read(self, ids: Tensor, length: int, cache: DynamicCache, layers: list[int]) -> dict[int, Tensor]:
        """Runs tokens behind what the cache holds, `length` in all."""
        ids = ids.to(self.model.device)
        mask = torch.ones(len(ids), length, dtype=torch.long, device=ids.device)
        self.budget.spent(slice_flops(self.model, 0, max(layers), ids.numel()) / 3)  # no backward pass
        return read(self.model, input_ids=ids, attention_mask=mask, past_key_values=cache, layers=layers)


class _Beginnings:
    """Keys and values of rows of text, per layer, and room for one more token behind each."""

    def __init__(self, layers: list[tuple[Tensor, Tensor]]):
        self.layers = layers
        self.rows, self.length = layers[0][0].shape[0], layers[0][0].shape[2]
        self._cache: _OneMore | None = None

    def cache(self) -> "_OneMore":
        """Used over and over: each forward pass writes to the same last place."""
        if self._cache is None:
            self._cache = _OneMore(self.layers)
        return self._cache


class _OneMore(DynamicCache):
    """A cache that never grows: what is added to it stands behind what it was made from until the next addition."""

    def __init__(self, layers: list[tuple[Tensor, Tensor]]):
        super().__init__()
        for index, (keys, values) in enumerate(layers):
            super().update(keys, values, index)
        self._room = [tuple(torch.cat([part, part[:, :, :1]], dim=2) for part in layer) for layer in layers]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """All keys and values of a layer, the new ones last."""
        keys, values = self._room[layer_idx]
        keys[:, :, -1:], values[:, :, -1:] = key_states, value_states
        return keys, values


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
