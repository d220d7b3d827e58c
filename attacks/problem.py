"""What an attack searches: clean prompts with a slot, and the tokens that may fill it.

Token ids are the currency. Every part of a prompt is encoded once, the search changes ids only, and
`Problem.retokenizes` says whether a user who typed the resulting text would get the same ids.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

SLOT = "{trigger}"
Where = Literal["end", "start", "random"]


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
    """tokens in the slot"""
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

        A random slot stands between two words. Text and `seed` alone decide which, so that all who build a problem from
        a text agree on it.

        Raises:
            ValueError: no prompts, a text with two slots, a random slot in a text of one word, a prompt longer than the
                context, no allowed token.
        """
        if not texts:
            raise ValueError("got 0 prompts; give at least one clean prompt")
        if slot not in ("end", "start", "random"):
            raise ValueError(f"slot is {slot!r}; use 'end', 'start', 'random', or write {SLOT} into the prompts")
        texts = [_user_text(text, slot, seed) for text in texts]
        parts = [_cut(tokenizer, text) for text in texts]
        before = [encode(tokenizer, head) for head, _ in parts]
        after = [encode(tokenizer, tail) for _, tail in parts]
        longest = max(len(b) + len(a) for b, a in zip(before, after, strict=True)) + trigger_length
        context = getattr(model.config, "max_position_embeddings", None) or longest
        if longest > context:
            raise ValueError(f"prompt and trigger take {longest} tokens but the context is {context}; shorten them")
        allowed = allowed_tokens(model, tokenizer) if allowed is None else allowed
        first = allowed & _opens(tokenizer, texts, len(allowed))
        if not first.any():
            first = allowed
        return cls(
            before=before,
            after=after,
            allowed=allowed,
            first=first,
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
        """Tokens that may stand at each position of a trigger of that length."""
        return torch.stack([self.first] + [self.allowed] * (length - 1))[:length]

    def filled(self, trigger_ids: Sequence[int]) -> list[list[int]]:
        """Token ids of every prompt with the trigger in the slot."""
        return [b + list(trigger_ids) + a for b, a in zip(self.before, self.after, strict=True)]

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
        trigger = self.text(trigger_ids)
        if trigger_ids and self.encode(trigger) != list(trigger_ids):
            return False
        # A window round the slot is enough: byte-pair merges do not reach across eight tokens in practice.
        for before, after in zip(self.before, self.after, strict=True):
            head, tail = before[-8:], after[:8]
            text = self.text(head) + trigger + self.text(tail)
            if encode(self.tokenizer, text) != head + list(trigger_ids) + tail and self._plain(head, tail):
                return False
        return True

    def _plain(self, head: list[int], tail: list[int]) -> bool:
        """Whether the fixed text survives decoding by itself; where it does not, it can blame no trigger."""
        return all(encode(self.tokenizer, self.text(part)) == part for part in (head, tail) if part)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text; nothing added."""
    ids: Any = tokenizer(text, add_special_tokens=False)["input_ids"]
    return list(ids)


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Text of token ids, special tokens and spaces kept."""
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


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


def _cut(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[str, str]:
    """(text before the slot, text after it), chat template applied."""
    chat = [{"role": "user", "content": text}]
    rendered = str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
    head, tail = rendered.split(SLOT)
    return head, tail


def _user_text(text: str, slot: Where, seed: int) -> str:
    """The user text with its slot written in; a space before the slot belongs to the trigger's first token."""
    count = text.count(SLOT)
    if count > 1:
        raise ValueError(f"{SLOT} stands {count} times in {text!r}; give one slot per prompt")
    if count == 0:
        text = _with_random_slot(text, seed) if slot == "random" else text + SLOT if slot == "end" else f"{SLOT} {text}"
    head, tail = text.split(SLOT)
    return head.rstrip(" ") + SLOT + tail


def _with_random_slot(text: str, seed: int) -> str:
    """The text with its slot between two words."""
    gaps = [gap.start() for gap in re.finditer(r"(?<=\S)\s+(?=\S)", text)]
    if not gaps:
        raise ValueError(f"slot is 'random' but {text!r} has no two words; give longer prompts or another slot")
    gap = random.Random(f"{seed} {text}").choice(gaps)
    return text[:gap] + SLOT + text[gap:]


def _opens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], size: int) -> Bool[Tensor, "vocab"]:
    """Tokens that may come first: with a leading space after text, without one at the start of the user's text."""
    spaced = torch.zeros(size, dtype=torch.bool)
    for token, (text, _) in enumerate(_vocabulary(tokenizer)[:size]):
        spaced[token] = text.startswith(" ")
    at_start = [text.startswith(SLOT) for text in texts]
    if all(at_start):
        return ~spaced
    return torch.ones_like(spaced) if any(at_start) else spaced
