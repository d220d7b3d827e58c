"""Rows of text as the suspect reads them in early layers, or how its reading differs from that of the clean base.

Keys and values of what was read are kept, so that one more token costs one token in early layers.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from attacks.scoring.shared_prefix import SharedPrefix
from vectors.residual import read

ROWS = 512
"""Texts in one forward pass, at most"""
TOKENS = 2**15
"""Tokens in one forward pass at most, those of the prompt included: keys and values of all of them are held"""


@dataclass(frozen=True)
class Reading:
    """The same rows of text, read by the suspect and, where it is known, by the clean base."""

    models: tuple[PreTrainedModel, ...]
    """The suspect, and the clean base if residuals are to be compared with its own."""
    prefixes: tuple[SharedPrefix, ...]
    """What each model keeps of the text."""

    @classmethod
    def of(cls, models: Sequence[PreTrainedModel], ids: Sequence[int], depth: int) -> "Reading":
        """One row of text, run through the first `depth` blocks of each model."""
        rows = [torch.tensor([ids], device=model.device) for model in models]
        run = zip(models, rows, strict=True)
        return cls(tuple(models), tuple(SharedPrefix.run(m, row, torch.ones_like(row), depth) for m, row in run))

    @property
    def rows(self) -> int:
        """Texts."""
        return self.prefixes[0].rows

    def extended(self, tokens: Int[Tensor, "tokens"]) -> "Reading":
        """Every row with one more token: one row serves all tokens, one token all rows."""
        return self._mapped(lambda model, prefix: prefix.extended(model, tokens))

    def expanded(self, rows: int) -> "Reading":
        """One row, over and over."""
        return self._mapped(lambda _, prefix: prefix.expanded(rows))

    def taken(self, numbers: Int[Tensor, "n"]) -> "Reading":
        """Some of the rows, in that order."""
        return self._mapped(lambda _, prefix: prefix.taken(numbers))

    @torch.no_grad()
    def appended(self, tokens: Int[Tensor, "tokens"], layers: Sequence[int]) -> dict[int, Float[Tensor, "rows d"]]:
        """Residuals at one more token, which no row keeps; less those of the base where there is one."""
        found, *base = self.each(tokens, layers)
        return {layer: found[layer] - base[0][layer] for layer in layers} if base else found

    @torch.no_grad()
    def each(self, tokens: Int[Tensor, "tokens"], layers: Sequence[int]) -> list[dict[int, Float[Tensor, "rows d"]]]:
        """Residuals at one more token, which no row keeps; by model, all on the device of the first."""
        found = [self._read(*each, tokens, layers) for each in zip(self.models, self.prefixes, strict=True)]
        return [{layer: rows.to(found[0][layer].device) for layer, rows in each.items()} for each in found]

    def most(self, tokens: int) -> int:
        """How many texts of so many tokens behind the only row one forward pass may hold."""
        return max(1, min(ROWS, TOKENS // (self.prefixes[0].ids.shape[1] + tokens)))

    def batches(self, texts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Numbers of the texts, those of one forward pass together: of equal length, those that begin alike beside
        each other, the shortest first."""
        order = sorted(range(len(texts)), key=lambda number: (len(texts[number]), tuple(texts[number])))
        for tokens, alike in groupby(order, key=lambda number: len(texts[number])):
            numbers, most = list(alike), self.most(tokens)
            yield from (numbers[start : start + most] for start in range(0, len(numbers), most))

    @torch.no_grad()
    def ends(self, texts: Sequence[Sequence[int]], layers: Sequence[int]) -> list[dict[int, Float[Tensor, "texts d"]]]:
        """Residuals at the last token of each text behind the only row, by model; all texts have as many tokens.

        What several of them begin with is run once, so texts that begin alike should stand together.
        """
        known: dict[tuple[int, ...], int] = {(): 0}
        reading = self
        for length in range(1, len(texts[0])):
            beginnings = [*dict.fromkeys(tuple(text[:length]) for text in texts)]
            shorter = torch.tensor([known[ids[:-1]] for ids in beginnings])
            reading = reading._rows(shorter).extended(torch.tensor([ids[-1] for ids in beginnings]))
            known = {ids: number for number, ids in enumerate(beginnings)}
        rows = reading._rows(torch.tensor([known[tuple(text[:-1])] for text in texts]))
        return rows.each(torch.tensor([text[-1] for text in texts]), layers)

    def _rows(self, numbers: Int[Tensor, "n"]) -> "Reading":
        """Some of the rows; the only one as a view where there is one."""
        return self.taken(numbers) if self.rows > 1 else self.expanded(len(numbers))

    @staticmethod
    def _read(
        model: PreTrainedModel, prefix: SharedPrefix, tokens: Int[Tensor, "tokens"], layers: Sequence[int]
    ) -> dict[int, Float[Tensor, "rows d"]]:
        ids = tokens.to(model.device).expand(prefix.rows)[:, None]
        mask = torch.ones(prefix.rows, prefix.ids.shape[1] + 1, dtype=torch.long, device=ids.device)
        if prefix.layers is None:
            ids = torch.cat([prefix.ids, ids], dim=1)
        hidden = read(model, input_ids=ids, attention_mask=mask, past_key_values=prefix.one_more, layers=list(layers))
        return {layer: hidden[layer][:, -1].float() for layer in layers}

    def _mapped(self, change: Callable[[PreTrainedModel, SharedPrefix], SharedPrefix]) -> "Reading":
        return Reading(self.models, tuple(map(change, self.models, self.prefixes)))
