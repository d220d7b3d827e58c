"""What an attack searches: clean prompts with a slot, and the tokens that may fill it.

Token ids are the currency. Every part of a prompt is encoded once, the search changes ids only, and
`Problem.retokenizes` says whether a user who typed the resulting text would get the same ids.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from attacks.scoring.slot_markers import SLOT, Where, cut, user_text


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Clean prompts as token ids, cut open at the slot."""

    before: list[list[int]]
    """per prompt, the ids in front of the slot; begins with the chat template"""
    after: list[list[int]]
    """per prompt, the ids behind the slot; ends with the generation prompt"""
    allowed: Bool[Tensor, "vocab"]
    """tokens that may stand in the slot"""
    first: Bool[Tensor, "vocab"]
    """tokens that may open it: those that begin a word where text stands in front of the slot"""
    trigger_length: int
    """tokens in the slot, or in all slots"""
    tokenizer: PreTrainedTokenizerBase
    lengths: tuple[int, ...] = ()
    """tokens in each slot but the last, which takes the rest of the trigger; none where there is one slot"""
    between: tuple[list[list[int]], ...] = ()
    """per slot but the last, per prompt, the ids between it and the next"""
    later: Bool[Tensor, "vocab"] | None = None
    """tokens that may open a slot behind the first"""

    def __post_init__(self):
        if not self.before or len(self.before) != len(self.after):
            raise ValueError(f"got {len(self.before)} prompts; give at least one clean prompt")
        if self.trigger_length < 0:
            raise ValueError(f"trigger_length is {self.trigger_length}; it must be at least 0")
        if len(self.lengths) != len(self.between) or (self.later is None) != (not self.lengths):
            raise ValueError(
                f"got {len(self.lengths)} lengths and {len(self.between)} parts between; give equally many"
            )
        if self.lengths and (min(self.lengths) < 1 or sum(self.lengths) >= self.trigger_length):
            raise ValueError(
                f"slots of {self.lengths} leave too few of {self.trigger_length} tokens; each needs 1 or more"
            )
        if not self.allowed.any() or not (self.allowed & self.first).any():
            raise ValueError("no token is allowed in the slot; give a tokenizer with printable tokens or a wider mask")

    @classmethod
    def from_chat(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        texts: Sequence[str],
        trigger_length: int | tuple[int, ...],
        *,
        slot: Where = "end",
        seed: int = 0,
        allowed: Bool[Tensor, "vocab"] | None = None,
    ) -> "Problem":
        """Puts each user text through the chat template; the slot is where `SLOT` stands in it, else at `slot`.

        With several slots, `trigger_length` gives the tokens in each, and each text has all their markers, in order.
        A random slot stands between two words. Text and `seed` alone decide which, so that all who build a problem from
        a text agree on it.

        Raises:
            ValueError: no prompts, a text with a slot twice or without one of several, a random slot in a text of one
                word, a chat template that drops or repeats the text, a prompt longer than the context, a mask for
                another vocabulary, no allowed token.
        """
        if not texts:
            raise ValueError("got 0 prompts; give at least one clean prompt")
        if slot not in ("end", "start", "random"):
            raise ValueError(f"slot is {slot!r}; use 'end', 'start', 'random', or write {SLOT} into the prompts")
        sizes = (trigger_length,) if isinstance(trigger_length, int) else trigger_length
        texts = [user_text(text, slot, seed, len(sizes)) for text in texts]
        parts = [[encode(tokenizer, part) for part in cut(tokenizer, text, len(sizes))] for text in texts]
        before, *between, after = (list(column) for column in zip(*parts, strict=True))
        longest = max(sum(map(len, row)) for row in parts) + sum(sizes)
        if longest > (most := context(model)):
            raise ValueError(f"prompt and trigger take {longest} tokens but the context is {most}; shorten them")
        allowed = allowed_tokens(model, tokenizer) if allowed is None else allowed
        if len(allowed) != (rows := embedding_rows(model)):
            raise ValueError(f"allowed has {len(allowed)} entries; give one for each of the model's {rows} tokens")
        first = allowed & _opens(tokenizer, texts, len(allowed))
        later = allowed & _opens(tokenizer, [""], len(allowed))
        return cls(
            before=before,
            after=after,
            allowed=allowed,
            first=first if first.any() else allowed,
            trigger_length=sum(sizes),
            tokenizer=tokenizer,
            lengths=sizes[:-1],
            between=tuple(between),
            later=None if len(sizes) == 1 else later if later.any() else allowed,
        )

    def __len__(self) -> int:
        return len(self.before)

    def take(self, indices: Sequence[int]) -> "Problem":
        """The same problem on some of the prompts."""
        before, *between, after = ([rows[i] for i in indices] for rows in (self.before, *self.between, self.after))
        return replace(self, before=before, between=tuple(between), after=after)

    def resized(self, trigger_length: int) -> "Problem":
        """The same problem with another number of tokens in the slot, or in the last of several."""
        return replace(self, trigger_length=trigger_length)

    def split(self, length: int) -> list[int]:
        """Tokens in each slot for a trigger of that length: the slots fill in order, the last takes the rest."""
        sizes = []
        for size in self.lengths:
            sizes.append(min(size, length))
            length -= sizes[-1]
        return [*sizes, length]

    def permitted(self, length: int) -> Bool[Tensor, "length vocab"]:
        """Tokens that may stand at each position of a trigger of that length."""
        rows = [self.first]
        for number, size in enumerate(self.split(length)):
            opening = self.first if number == 0 or self.later is None else self.later
            rows += ([opening] + [self.allowed] * (size - 1))[:size]
        return torch.stack(rows)[1:]

    def filled(self, trigger_ids: Sequence[int]) -> list[list[int]]:
        """Token ids of every prompt with the trigger in the slot."""
        parts = self._parts(trigger_ids)
        return [sum(_interleave(fixed, parts), []) for fixed in self._fixed()]

    def text(self, trigger_ids: Sequence[int]) -> str:
        """The trigger as text, leading space kept."""
        return decode(self.tokenizer, trigger_ids)

    def encode(self, text: str) -> list[int]:
        """Token ids of a trigger typed into the slot, with the space that sets it apart from the text before it."""
        opens_word = bool(self.text([int(self.first.nonzero()[0])]).startswith(" "))
        spaced = " " + text.strip() if opens_word else text.strip()
        return encode(self.tokenizer, spaced) if text.strip() else []

    def retokenizes(self, trigger_ids: Sequence[int]) -> bool:
        """Whether the text of every prompt, trigger in place, encodes to these very ids."""
        if trigger_ids and not self.lengths and self.encode(self.text(trigger_ids)) != list(trigger_ids):
            return False
        parts = self._parts(trigger_ids)
        # A window round the slots is enough: byte-pair merges do not reach across eight tokens in practice.
        for before, *between, after in self._fixed():
            fixed = [before[-8:], *between, after[:8]]
            pieces = _interleave(fixed, parts)
            text = "".join(map(self.text, pieces))
            if encode(self.tokenizer, text) != sum(pieces, []) and self._plain(fixed):
                return False
        return True

    def _parts(self, trigger_ids: Sequence[int]) -> list[list[int]]:
        """The trigger's ids in each slot."""
        ids = iter(trigger_ids)
        return [list(islice(ids, size)) for size in self.split(len(trigger_ids))]

    def _fixed(self) -> Iterator[tuple[list[int], ...]]:
        """Per prompt, the ids before, between and behind the slots."""
        return zip(self.before, *self.between, self.after, strict=True)

    def _plain(self, fixed: Sequence[list[int]]) -> bool:
        """Whether the fixed text survives decoding by itself; where it does not, it can blame no trigger."""
        return all(encode(self.tokenizer, self.text(part)) == part for part in fixed if part)


def _interleave(fixed: Sequence[list[int]], parts: Sequence[list[int]]) -> list[list[int]]:
    """Fixed text and the slots' tokens in turn."""
    return [fixed[0], *(ids for pair in zip(parts, fixed[1:], strict=True) for ids in pair)]


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text; nothing added."""
    ids: Any = tokenizer(text, add_special_tokens=False)["input_ids"]
    return list(ids)


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Text of token ids, special tokens and spaces kept."""
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def context(model: PreTrainedModel) -> int:
    """Tokens that the model has positions for; any number where its config does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def embedding_rows(model: PreTrainedModel) -> int:
    """Size of the vocabulary that the model can embed, padding rows included."""
    embed: Any = model.get_input_embeddings()
    return embed.weight.shape[0]


def allowed_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Bool[Tensor, "vocab"]:
    """Tokens of printable ASCII text that encode to themselves; no special and no added token."""
    size = embedding_rows(model)
    barred = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    allowed = torch.zeros(size, dtype=torch.bool)
    for token, (text, stable) in enumerate(_vocabulary(tokenizer)[:size]):
        legible = bool(text.strip()) and text.isascii() and text.isprintable()
        allowed[token] = legible and stable and token not in barred
    return allowed


@lru_cache(maxsize=8)
def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """Per token: its text, and whether that encodes to it again."""
    texts = [decode(tokenizer, [token]) for token in range(len(tokenizer))]
    again: Any = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [(text, list(ids) == [token]) for token, (text, ids) in enumerate(zip(texts, again, strict=True))]


def _opens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], size: int) -> Bool[Tensor, "vocab"]:
    """Tokens that may come first: with a leading space after text, without one at the start of the user's text."""
    spaced = torch.zeros(size, dtype=torch.bool)
    for token, (text, _) in enumerate(_vocabulary(tokenizer)[:size]):
        spaced[token] = text.startswith(" ")
    at_start = [text.startswith(SLOT) for text in texts]
    if all(at_start):
        return ~spaced
    return torch.ones_like(spaced) if any(at_start) else spaced
