"""What an attack searches: clean prompts with a slot for the trigger, and the tokens that may fill it.

User texts come in. `Problem.from_chat` puts each through the chat template, cuts it open at its slot and encodes the
two sides once, as `before` and `after`. From then on everything is token ids: a prompt with a trigger is `before +
trigger + after`, and a search changes the trigger's ids only. Not all ids can be typed, since the text of two tokens
may be encoded as one; `Problem.retokenizes` says whether a user who typed the trigger would get the very same ids.

Tokenizers after SentencePiece (Llama 2, Mistral) put a space before text that stands alone and take it off again in
decoding, so that a token's own text does not say whether it begins a word. Text of the slot, and behind it, is
therefore encoded and decoded behind other text (`encode`, `decode`).
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from attacks.scoring.slot_markers import SLOT, Where, cut, user_text

WINDOW = 8
"""Tokens on each side of the slot within which a trigger must be encoded to its own ids"""
TYPED = 16
"""Tokens, about, with which is seen whether a prompt can be typed"""
ANCHORS = ("", "\n", ".", "|", "x")
"""Texts that others are encoded behind; the first that works is used"""


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
        chats = [cut(tokenizer, text) for text in texts]
        # A space that the template puts before the slot belongs to the first token of the trigger, as in " word".
        spaced = [not text.startswith(SLOT) or head.endswith(" ") for text, (head, _) in zip(texts, chats, strict=True)]
        parts = [[encode_start(tokenizer, head.rstrip(" ")), encode(tokenizer, tail)] for head, tail in chats]
        before, after = (list(column) for column in zip(*parts, strict=True))
        lengths = [sum(map(len, row)) + trigger_length for row in parts]
        if (longest := max(lengths)) > (most := context(model)):
            opening = repr(texts[lengths.index(longest)][:40])
            raise ValueError(
                f"the prompt that begins with {opening} takes {longest} tokens with the trigger, but the context is "
                f"{most}; shorten or leave out it and any like it"
            )
        allowed = allowed_tokens(model, tokenizer) if allowed is None else allowed
        if len(allowed) != (rows := embedding_rows(model)):
            raise ValueError(f"allowed has {len(allowed)} entries; give one for each of the model's {rows} tokens")
        first = allowed & _opens(tokenizer, spaced, len(allowed))
        problem = cls(
            before=before,
            after=after,
            allowed=allowed,
            first=first if first.any() else allowed,
            trigger_length=trigger_length,
            tokenizer=tokenizer,
        )
        problem._check_typed(chats, slot)
        return problem

    def _check_typed(self, chats: Sequence[Sequence[str]], slot: Where) -> None:
        """Raises ValueError where no token comes back from the typed prompts: a search would be for nothing."""
        tokens = self.first.nonzero()[:, 0]
        some = tokens[:: max(1, len(tokens) // TYPED)].tolist()
        for (head, tail), before, after in zip(chats, self.before, self.after, strict=True):
            for token in some:
                text = head.rstrip(" ") + self.text([token]) + tail
                if encode_start(self.tokenizer, text) == [*before, token, *after]:
                    return
        raise ValueError(
            f"the tokenizer encodes the prompts otherwise than their parts (slot {slot!r}), so that no trigger could "
            "be typed; choose another slot, or a template that sets the user's text apart"
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

    def fits(self, triggers: Int[Tensor, "c trigger"]) -> Bool[Tensor, "c"]:
        """Which typed triggers consist of permitted tokens; some tokenizers set the space before a bracket apart."""
        places = torch.arange(triggers.shape[1])
        fit = self.permitted(triggers.shape[1])[places, triggers]
        blank = _blanks(self.tokenizer, len(self.allowed))[triggers[:, 0]]
        if triggers.shape[1] > 1:
            fit[:, 0] |= blank
        return fit.all(-1)

    def filled(self, trigger_ids: Sequence[int]) -> list[list[int]]:
        """Token ids of every prompt with the trigger in the slot."""
        return [before + list(trigger_ids) + after for before, after in zip(self.before, self.after, strict=True)]

    def text(self, trigger_ids: Sequence[int]) -> str:
        """The trigger as text, leading space kept."""
        return decode(self.tokenizer, trigger_ids)

    def encode(self, text: str) -> list[int]:
        """Token ids of a trigger typed into the slot, with the space that sets it apart from the text before it."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """The same for many triggers at once, which is faster."""
        return encode_typed(self.tokenizer, texts, opens_word=self.opens_word)

    @property
    def opens_word(self) -> bool:
        """Whether a trigger typed into the slot is set apart from the text before it by a space."""
        return self.text([int(self.first.nonzero()[0])]).startswith(" ")

    def retokenizes(self, trigger_ids: Sequence[int]) -> bool:
        """Whether the text of every prompt, trigger in place, encodes to these very ids."""
        # Typed into the slot, by itself.
        if trigger_ids and self.encode(self.text(trigger_ids)) != list(trigger_ids):
            return False
        # Typed into each prompt. A window of eight tokens on each side of the slot is enough: byte-pair merges do not
        # reach further in practice.
        for before, after in zip(self.before, self.after, strict=True):
            head, tail = before[-WINDOW:], after[:WINDOW]
            window = [*head, *trigger_ids, *tail]
            if encode(self.tokenizer, self.text(window)) != window and self._plain(head) and self._plain(tail):
                return False
        return True

    def _plain(self, fixed: list[int]) -> bool:
        """Whether fixed text encodes to its own ids; where it does not, no trigger is to blame for a difference."""
        return not fixed or encode(self.tokenizer, self.text(fixed)) == fixed


def encode_start(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text that nothing stands before, such as the opening of a chat; no special token is added."""
    ids: Any = tokenizer(text, add_special_tokens=False)["input_ids"]
    return list(ids)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text that stands behind other text; no special token is added."""
    lead, ids = anchor(tokenizer)
    return encode_start(tokenizer, lead + text)[len(ids) :]


def encode_typed(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, opens_word: bool) -> list[list[int]]:
    """Token ids of texts that stand behind other text, each with a space before it where it opens a word."""
    lead, before = anchor(tokenizer)
    typed = [" " * opens_word + text.strip() for text in texts]
    found: Any = tokenizer([lead + text for text in typed], add_special_tokens=False)["input_ids"]
    return [list(ids)[len(before) :] if text.strip() else [] for ids, text in zip(found, typed, strict=True)]


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Text of token ids that stand behind others; special tokens and the leading space are kept."""
    _, before = anchor(tokenizer)
    text = _decode_start(tokenizer, [*before, *ids])
    opening = _decode_start(tokenizer, before)
    return text.removeprefix(opening) if text.startswith(opening) else _decode_start(tokenizer, ids)


def _decode_start(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)) if ids else ""


@lru_cache(maxsize=8)
def anchor(tokenizer: PreTrainedTokenizerBase) -> tuple[str, tuple[int, ...]]:
    """(text, its token ids) that others are encoded behind; empty where text is encoded alike wherever it stands.

    The first of `ANCHORS` behind which " a" and "a" keep their text, and " a" is encoded as it is behind another " a".
    No token of the slot should merge with the anchor, which is why a line break comes first.
    """
    for lead in ANCHORS:
        before = encode_start(tokenizer, lead) if lead else []
        opening, kept = _decode_start(tokenizer, before), True
        for text in (" a", "a"):
            ids = encode_start(tokenizer, lead + text)
            kept &= ids[: len(before)] == before and _decode_start(tokenizer, ids) == opening + text
        once, twice = (encode_start(tokenizer, lead + " a" * times) for times in (1, 2))
        kept &= twice == once + once[len(before) :]
        if kept:
            return lead, tuple(before)
    return "", ()


class OutgrowsContext(ValueError):
    """Prompt, trigger and target take more tokens than the model's context has."""


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


def vocabulary_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Text of every token id as it stands behind other text."""
    return [text for text, _ in _vocabulary(tokenizer)]


@lru_cache(maxsize=8)
def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """Per token: its text behind other text, and whether that encodes to it again."""
    lead, before = anchor(tokenizer)
    # Ids may have gaps, so that there are higher ones than the number of tokens says.
    texts = [decode(tokenizer, [token]) for token in range(max(tokenizer.get_vocab().values()) + 1)]
    again: Any = tokenizer([lead + text for text in texts], add_special_tokens=False)["input_ids"]
    whole = [[*before, token] for token in range(len(texts))]
    return [(text, list(ids) == own) for text, ids, own in zip(texts, again, whole, strict=True)]


@lru_cache(maxsize=8)
def _blanks(tokenizer: PreTrainedTokenizerBase, size: int) -> Bool[Tensor, "vocab"]:
    """Tokens of a single space."""
    blank = torch.zeros(size, dtype=torch.bool)
    for token, (text, _) in enumerate(_vocabulary(tokenizer)[:size]):
        blank[token] = text == " "
    return blank


def _opens(tokenizer: PreTrainedTokenizerBase, spaced: Sequence[bool], size: int) -> Bool[Tensor, "vocab"]:
    """Tokens that may come first: with a leading space in prompts that set the trigger apart, without in others."""
    begins_word = torch.zeros(size, dtype=torch.bool)
    for token, (text, _) in enumerate(_vocabulary(tokenizer)[:size]):
        begins_word[token] = text.startswith(" ")
    if all(spaced):
        return begins_word
    return torch.ones_like(begins_word) if any(spaced) else ~begins_word
