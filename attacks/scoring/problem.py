"""What an attack searches: clean prompts with a slot for the trigger, and the tokens that may fill it.

User texts come in. `Problem.from_chat` puts each through the chat template, cuts it open at its slot and encodes the
two sides once, as `before` and `after`. From then on everything is token ids: a prompt with a trigger is `before +
trigger + after`, and a search changes the trigger's ids only. Not all ids can be typed, since the text of two tokens
may be encoded as one; `Problem.retokenizes` says whether a user who typed the trigger would get the very same ids.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
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
    """Per prompt, the token ids in front of the slot, chat template included."""
    after: list[list[int]]
    """Per prompt, the token ids behind the slot, up to the end of the generation prompt."""
    allowed: Bool[Tensor, "vocab"]
    """Tokens that may stand in the slot."""
    first: Bool[Tensor, "vocab"]
    """Tokens that may come first in the slot: those that begin a word, where text stands in front of the slot."""
    trigger_length: int
    """Tokens in the slot."""
    tokenizer: PreTrainedTokenizerBase

    def __post_init__(self):
        if not self.before or len(self.before) != len(self.after):
            raise ValueError(f"got {len(self.before)} prompts; give at least one clean prompt")
        if self.trigger_length < 0:
            raise ValueError(f"trigger_length is {self.trigger_length}; it must be at least 0")
        if not self.allowed.any() or not (self.allowed & self.first).any():
            raise ValueError("no token is allowed in the slot; give a tokenizer with printable tokens or a wider mask")

    @classmethod
    def from_chat(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        texts: Sequence[str],
        trigger_length: int,
        *,
        slot: Where = "end",
        seed: int = 0,
        allowed: Bool[Tensor, "vocab"] | None = None,
    ) -> "Problem":
        """Puts each user text through the chat template; the slot is where `SLOT` stands in it, else at `slot`.

        A random slot stands between two words. The text and `seed` alone decide which, so that two problems made from
        one text have their slots at the same place.

        Raises:
            ValueError: no prompts, a text with two slots, a random slot in a text of one word, a chat template that
                drops or repeats the text, a prompt longer than the context, a mask for another vocabulary, no allowed
                token.
        """
        if not texts:
            raise ValueError("got 0 prompts; give at least one clean prompt")
        if slot not in ("end", "start", "random"):
            raise ValueError(f"slot is {slot!r}; use 'end', 'start', 'random', or write {SLOT} into the prompts")
        texts = [user_text(text, slot, seed) for text in texts]
        parts = [[encode(tokenizer, part) for part in cut(tokenizer, text)] for text in texts]
        before, after = (list(column) for column in zip(*parts, strict=True))
        longest = max(sum(map(len, row)) for row in parts) + trigger_length
        if longest > (most := context(model)):
            raise ValueError(f"prompt and trigger take {longest} tokens but the context is {most}; shorten them")
        allowed = allowed_tokens(model, tokenizer) if allowed is None else allowed
        if len(allowed) != (rows := embedding_rows(model)):
            raise ValueError(f"allowed has {len(allowed)} entries; give one for each of the model's {rows} tokens")
        first = allowed & _opens(tokenizer, texts, len(allowed))
        return cls(
            before=before,
            after=after,
            allowed=allowed,
            first=first if first.any() else allowed,
            trigger_length=trigger_length,
            tokenizer=tokenizer,
        )

    def __len__(self) -> int:
        return len(self.before)

    def take(self, indices: Sequence[int]) -> "Problem":
        """The same problem on some of the prompts."""
        return replace(self, before=[self.before[i] for i in indices], after=[self.after[i] for i in indices])

    def resized(self, trigger_length: int) -> "Problem":
        """The same problem with another number of tokens in the slot."""
        return replace(self, trigger_length=trigger_length)

    def permitted(self, length: int) -> Bool[Tensor, "length vocab"]:
        """Tokens that may stand at each position of a trigger of that length: `first` at its head, `allowed` behind."""
        return torch.stack([self.first, *[self.allowed] * (length - 1)])[:length]

    def filled(self, trigger_ids: Sequence[int]) -> list[list[int]]:
        """Token ids of every prompt with the trigger in the slot."""
        return [before + list(trigger_ids) + after for before, after in zip(self.before, self.after, strict=True)]

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
        # Typed into the slot, by itself.
        if trigger_ids and self.encode(self.text(trigger_ids)) != list(trigger_ids):
            return False
        # Typed into each prompt. A window of eight tokens on each side of the slot is enough: byte-pair merges do not
        # reach further in practice.
        for before, after in zip(self.before, self.after, strict=True):
            pieces = [before[-8:], list(trigger_ids), after[:8]]
            text = "".join(map(self.text, pieces))
            if encode(self.tokenizer, text) != sum(pieces, []) and self._plain(before[-8:]) and self._plain(after[:8]):
                return False
        return True

    def _plain(self, fixed: list[int]) -> bool:
        """Whether fixed text encodes to its own ids; where it does not, no trigger is to blame for a difference."""
        return not fixed or encode(self.tokenizer, self.text(fixed)) == fixed


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
