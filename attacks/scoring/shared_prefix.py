"""Text that many candidates have in common is run once: families that begin alike, and what the model keeps of it.

A `SharedPrefix` is rows of tokens that a model has read up to some depth, as keys and values per layer. A model that
keeps something else (a recurrent or convolution state) gets its text anew behind every prefix: slower, and correct.
"""

import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
import transformers
from jaxtyping import Int
from packaging.version import Version
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from vectors.capabilities import has_plain_cache
from vectors.generate import reordered
from vectors.residual import read

_plain: "WeakKeyDictionary[PreTrainedModel, bool]" = WeakKeyDictionary()
"""Whether each model keeps keys and values alone: found out once, for it takes a forward pass"""


def keeps_keys_and_values(model: PreTrainedModel) -> bool:
    """Whether a text can be continued from keys and values alone."""
    if model not in _plain:
        _plain[model] = has_plain_cache(model)
    return _plain[model]


def check_cache(model: PreTrainedModel) -> None:
    """Raises ValueError where an old transformers takes no `DynamicCache`; Gemma 2 would go on with wrong masks."""
    own = not getattr(model, "_supports_cache_class", True) or getattr(model.config, "cache_implementation", None)
    if own and Version(transformers.__version__) < Version("4.50"):
        raise ValueError(
            f"transformers {transformers.__version__} cannot continue {type(model).__name__} from cached keys and "
            "values; install transformers 4.50 or newer"
        )


@dataclass(frozen=True)
class SharedPrefix:
    """Rows of text that were read; the stored tensors are never written to."""

    ids: Int[Tensor, "rows seq"]
    """Tokens, left-padded."""
    mask: Int[Tensor, "rows seq"]
    """1 on real tokens."""
    layers: list[tuple[Tensor, Tensor]] | None
    """Keys and values per layer, `rows heads seq width`; None where the text is run anew each time."""
    depth: int
    """Blocks that were run."""

    @classmethod
    @torch.no_grad()
    def run(
        cls,
        model: PreTrainedModel,
        ids: Int[Tensor, "rows seq"],
        mask: Int[Tensor, "rows seq"],
        depth: int,
        behind: "SharedPrefix | None" = None,
    ) -> "SharedPrefix":
        """Runs left-padded `ids`, behind another prefix of as many rows where one is given, through `depth` blocks."""
        whole, seen = ids, mask
        if behind is not None:
            whole, seen = torch.cat([behind.ids, ids], dim=1), torch.cat([behind.mask, mask], dim=1)
        if not ids.shape[1] or not keeps_keys_and_values(model):
            return cls(whole, seen, None, depth)
        cache = DynamicCache() if behind is None else behind.cache(1, depth)
        read(model, input_ids=ids, attention_mask=seen, past_key_values=cache, layers=[depth])
        return cls(whole, seen, keys_and_values(cache)[:depth], depth)

    @property
    def rows(self) -> int:
        """Texts."""
        return len(self.ids)

    def cache(self, times: int, depth: int) -> DynamicCache | None:
        """A fresh cache for the first `depth` blocks that holds all rows `times` over; None where nothing is kept."""
        if self.layers is None:
            return None
        fresh = DynamicCache()
        for index, (keys, values) in enumerate(self.layers[:depth]):
            fresh.update(_repeat(keys, times), _repeat(values, times), index)
        return fresh

    def passing(self, times: int, depth: int) -> DynamicCache | None:
        """The same for one forward pass that nothing goes on from: no block's keys and values are kept."""
        return None if self.layers is None else _Passing(self.layers[:depth], times)

    @property
    def uncached(self) -> "SharedPrefix":
        """The same text, to be run anew."""
        return SharedPrefix(self.ids, self.mask, None, self.depth)

    def expanded(self, rows: int) -> "SharedPrefix":
        """One row, over and over."""
        return self._mapped(lambda part: part.expand(rows, *part.shape[1:]))

    def taken(self, numbers: Int[Tensor, "n"]) -> "SharedPrefix":
        """Some of the rows, in that order."""
        return self._mapped(lambda part: part[numbers.to(part.device)])

    def extended(self, model: PreTrainedModel, tokens: Int[Tensor, "tokens"]) -> "SharedPrefix":
        """Every row with one more token: one row serves all tokens, one token all rows."""
        count = max(self.rows, len(tokens))
        rows = self if self.rows == count else self.expanded(count)
        ids = tokens.to(self.ids.device).expand(count)[:, None]
        return SharedPrefix.run(model, ids, torch.ones_like(ids), self.depth, rows)

    @cached_property
    def one_more(self) -> "DynamicCache | None":
        """A cache with room for one token behind each row; each forward pass writes to the same place."""
        return None if self.layers is None else _OneMore(self.layers)

    def _mapped(self, change: Any) -> "SharedPrefix":
        layers = None if self.layers is None else [(change(keys), change(values)) for keys, values in self.layers]
        return SharedPrefix(change(self.ids), change(self.mask), layers, self.depth)


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


class _Passing(DynamicCache):
    """A cache that forgets: each block gets its prefix, once per candidate, with what is new behind it.

    Only the stored `rows` are held for all blocks; those of `times` as many exist for one block at a time.
    """

    def __init__(self, layers: list[tuple[Tensor, Tensor]], times: int):
        super().__init__()
        for index, (keys, values) in enumerate(layers):
            super().update(keys, values, index)
        self._prefix, self._times = layers, times

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """All keys and values of a block, the new ones last."""
        keys, values = (_repeat(part, self._times) for part in self._prefix[layer_idx])
        return torch.cat([keys, key_states], dim=2), torch.cat([values, value_states], dim=2)


def repeated(cache: Any, rows: Int[Tensor, "rows"], layers: int) -> Any:
    """A copy of the model's own cache with the given rows, good for the first `layers` blocks; the cache stays."""
    cache = copy.deepcopy(cache)
    if not hasattr(cache, "layers"):
        return reordered(cache, rows)
    for block in cache.layers[:layers]:  # what is behind them is not read: it would take most of the memory
        block.reorder_cache(rows)
    return cache


def keys_and_values(cache: Any) -> list[tuple[Tensor, Tensor]]:
    """Keys and values per layer; the cache's own layout changed between transformers 4 and 5."""
    if hasattr(cache, "layers"):
        return [(layer.keys, layer.values) for layer in cache.layers]
    return list(zip(cache.key_cache, cache.value_cache, strict=True))


def _repeat(prefix: Tensor, times: int) -> Tensor:
    """The rows so many times over, without copying before the cache does."""
    return prefix.expand(times, *prefix.shape).flatten(0, 1)


def alike(candidates: Int[Tensor, "c trigger"], least: int) -> list[Int[Tensor, "k"]]:
    """Indices of the candidates, in families that begin with the same tokens; each candidate is in one family.

    A family whose members go on alike is split by the next token, as long as the parts have at least `least` members;
    the members of smaller parts stay together, with what they share. A batch of swaps in one trigger falls into one
    family per position, since a swap at position k leaves the k tokens before it as they were.

    Args:
        candidates: c triggers as ids.
        least: members below which a family is not worth a forward pass of its own.
    """
    # Each entry is (indices of candidates, how many tokens they are known to share).
    families, open_ = [], [(torch.arange(len(candidates)), 0)]
    while open_:
        rows, depth = open_.pop()
        if depth == candidates.shape[1] or len(rows) < least:
            families.append(rows)
            continue
        _, kin, sizes = candidates[rows, depth].unique(return_inverse=True, return_counts=True)
        if len(sizes) == 1:
            open_.append((rows, depth + 1))
            continue
        large = sizes >= least
        open_ += [(rows[kin == kind], depth + 1) for kind in large.nonzero()[:, 0]]
        if len(left := rows[~large[kin]]):
            families.append(left)
    return families
