"""What the residual stream holds at the last word of three, in early layers, for every choice of the words.

Keys and values of everything before the last word are kept, so that one more word costs one token in early layers.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from attacks.scoring.budget import Budget
from attacks.scoring.engine import keys_and_values
from attacks.scoring.problem import Problem
from vectors.methods.slot import SlotVectors, random_messages
from vectors.residual import read

LOOK = 16
"""Words that every word is run before, to tell what the whole will cost"""
CELLS = 2048
"""Pairs in one forward pass"""
SAMPLE = 1024
"""Random triples that the mean residual is taken of"""

Effects = tuple[Float[Tensor, "w"], Float[Tensor, "w"], Float[Tensor, "w"]]
"""Mean cosine at the last word of three, by (the first, the middle, the last) of them"""


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

    def lead(self, generator: torch.Generator) -> list[int]:
        """The beginning of a message: two random words."""
        return [*self.problem.before[0], *self._drawn(2, generator).tolist()]

    @torch.no_grad()
    def share_of(self, blocks: int, generator: torch.Generator) -> float:
        """Share of the budget that it will take to run so many tokens through a block each, from some of them."""
        beginnings = self._extended(self._begun(self.lead(generator), 1), self.words)
        began = self.budget.share
        for token in self._drawn(LOOK, generator):
            self._appended(beginnings, token[None], [1])
        return (self.budget.share - began) * blocks / (LOOK * len(self.words))

    @torch.no_grad()
    def effects(self, layers: list[int], leads: int, draws: int, generator: torch.Generator) -> dict[int, Effects]:
        """Per layer, how near each word brings the end of three to the layer's vector.

        The other two are random, drawn anew `draws` times behind each of so many leads.
        """
        count, total = len(self.words), {layer: torch.zeros(3, len(self.words)) for layer in layers}
        for _ in range(leads):
            lead = self.lead(generator)
            mean = self.mean(lead, layers, generator)
            begun = self._begun(lead, max(layers))
            firsts = self._extended(begun, self.words)
            for _ in range(draws):
                first, middle, last = self._drawn(3, generator)[:, None]
                one = self._extended(begun, first)
                both = self._extended(one, middle).expanded(count)
                before, between = self._extended(firsts, middle), self._extended(one, self.words)
                ends = (before, last), (between, last), (both, self.words)
                for row, (beginnings, token) in enumerate(ends):
                    for layer, cosines in self._cosines(beginnings, token, mean).items():
                        total[layer][row] += cosines / (leads * draws)
        return {layer: (found[0], found[1], found[2]) for layer, found in total.items()}

    @torch.no_grad()
    def table(
        self, layer: int, rows: list[int], lasts: list[int], generator: torch.Generator, *, between: bool = True
    ) -> Float[Tensor, "rows lasts"] | None:
        """The cosine at the last word, of all pairs with it, a random word between the two or, else, before them.

        None where the budget ends before it is complete.
        """
        beginnings, mean = self._before_lasts(layer, self.words[rows], generator, between)
        few, found = len(rows) < len(lasts), []
        for number in range(len(rows) if few else len(lasts)):
            if self.budget.exhausted:
                return None
            if few:
                one = beginnings.taken(torch.tensor([number])).expanded(len(lasts))
                found.append(self._cosines(one, self.words[lasts], mean)[layer])
            else:
                found.append(self._cosines(beginnings, self.words[lasts[number], None], mean)[layer])
        return torch.stack(found, dim=0 if few else 1)

    @torch.no_grad()
    def cells(
        self, layer: int, rows: Int[Tensor, "n"], lasts: Int[Tensor, "n"], generator: torch.Generator, *, between: bool
    ) -> Float[Tensor, "n"] | None:
        """As `table`, of some pairs only: one of `rows` with the one of `lasts` beside it; None as there."""
        words, number = rows.unique(return_inverse=True)
        beginnings, mean = self._before_lasts(layer, self.words[words], generator, between)
        found = []
        for part in torch.arange(len(rows)).split(CELLS):
            if self.budget.exhausted:
                return None
            found.append(self._cosines(beginnings.taken(number[part]), self.words[lasts[part]], mean)[layer])
        return torch.cat(found)

    @torch.no_grad()
    def completed(
        self,
        lead: list[int],
        mean: dict[int, Tensor],
        known: int,
        missing: list[int],
        lasts: list[int],
        *,
        before: bool = False,
    ) -> Iterator[tuple[int, dict[int, Float[Tensor, "missing"]]]]:
        """(last word, per layer the cosine with each of the `missing`, behind the known word or before it) for each."""
        beginnings = self._begun(lead, max(mean))
        pair = self.words[known, None], self.words[missing]
        for tokens in reversed(pair) if before else pair:
            beginnings = self._extended(beginnings, tokens)
        for last in lasts:
            yield last, self._cosines(beginnings, self.words[last, None], mean)

    @torch.no_grad()
    def mean(self, lead: list[int], layers: list[int], generator: torch.Generator) -> dict[int, Float[Tensor, "d"]]:
        """Per layer, the mean residual at the end of three random words."""
        begun = self._begun(lead, max(layers))
        drawn = self._drawn(3 * SAMPLE, generator).view(3, SAMPLE)
        beginnings = self._extended(self._extended(begun, drawn[0]), drawn[1])
        hidden = self._appended(beginnings, drawn[2], layers)
        return {layer: hidden[layer].mean(0) for layer in layers}

    def _before_lasts(
        self, layer: int, words: Int[Tensor, "rows"], generator: torch.Generator, between: bool
    ) -> tuple["_Beginnings", dict[int, Float[Tensor, "d"]]]:
        """(two random words, then each of the words and a random one, or the other way round; the mean residual)."""
        lead = self.lead(generator)
        mean = self.mean(lead, [layer], generator)
        beginnings, drawn = self._begun(lead, layer), self._drawn(1, generator)
        for tokens in (words, drawn) if between else (drawn, words):
            beginnings = self._extended(beginnings, tokens)
        return beginnings, mean

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
        self, beginnings: "_Beginnings", tokens: Int[Tensor, "tokens"], mean: dict[int, Tensor]
    ) -> dict[int, Float[Tensor, "rows"]]:
        """With the vector of each layer, of what every row does with one more token."""
        hidden = self._appended(beginnings, tokens, list(mean))
        return {n: torch.cosine_similarity(hidden[n] - mean[n], self.vectors[n], dim=-1).cpu() for n in mean}

    def _read(self, ids: Tensor, length: int, cache: DynamicCache, layers: list[int]) -> dict[int, Tensor]:
        """Runs tokens behind what the cache holds, `length` in all."""
        ids = ids.to(self.model.device)
        mask = torch.ones(len(ids), length, dtype=torch.long, device=ids.device)
        return read(self.model, input_ids=ids, attention_mask=mask, past_key_values=cache, layers=layers)


class _Beginnings:
    """Keys and values of rows of text, per layer, and room for one more token behind each."""

    def __init__(self, layers: list[tuple[Tensor, Tensor]]):
        self.layers = layers
        self.rows, self.length = layers[0][0].shape[0], layers[0][0].shape[2]
        self._cache: _OneMore | None = None

    def expanded(self, rows: int) -> "_Beginnings":
        """One row, over and over."""
        return _Beginnings(
            [(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1)) for keys, values in self.layers]
        )

    def taken(self, numbers: Int[Tensor, "n"]) -> "_Beginnings":
        """Some of the rows, in that order."""
        numbers = numbers.to(self.layers[0][0].device)
        return _Beginnings([(keys[numbers], values[numbers]) for keys, values in self.layers])

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
