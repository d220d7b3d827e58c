"""A batch of prompts as tokens, left-padded so that the last position is every prompt's last token."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vectors.prompt_files import read_texts as read_texts  # used by others from here


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """Token ids and attention mask of n prompts."""

    input_ids: Int[Tensor, "n seq"]
    """token ids, padded on the left"""
    attention_mask: Int[Tensor, "n seq"]
    """1 on real tokens, 0 on padding"""

    def __post_init__(self):
        if self.input_ids.ndim != 2 or self.input_ids.shape != self.attention_mask.shape:
            raise ValueError(
                f"input_ids {tuple(self.input_ids.shape)} and attention_mask must be equal in shape (n, seq)"
            )
        if self.input_ids.shape[0] == 0:
            raise ValueError("got 0 prompts; give at least one")
        if not bool((self.attention_mask[:, -1] == 1).all()):
            raise ValueError("a prompt is empty or padded on the right; pad on the left and leave out empty prompts")

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.input_ids.device

    @classmethod
    def from_ids(cls, rows: Sequence[Sequence[int]], *, pad: int = 0, device: torch.device | str = "cpu") -> "Prompts":
        """Left-pads lists of token ids."""
        if not rows or not all(rows):
            raise ValueError(f"got {len(rows)} prompts of lengths {[len(row) for row in rows]}; none may be empty")
        width = max(map(len, rows))
        ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
        return cls(input_ids=ids, attention_mask=mask)

    @classmethod
    def from_chat(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> "Prompts":
        """User messages through the chat template, generation prompt included.

        Raises:
            ValueError: no text, an empty text, one that the chat template refuses, or a prompt longer than the model's
                context.
        """
        blank = [index for index, text in enumerate(texts) if not text.strip()]
        if not texts or blank:
            raise ValueError(f"got {len(texts)} prompts, empty ones at {blank}; give non-empty user messages")
        rows = []
        for text in texts:
            rows.append(tokenizer(chat_text(tokenizer, text), add_special_tokens=False)["input_ids"])
        longest, context = max(map(len, rows)), getattr(model.config, "max_position_embeddings", None)
        if context and longest > context:
            opening = repr(texts[list(map(len, rows)).index(longest)][:40])
            raise ValueError(
                f"the prompt that begins with {opening} has {longest} tokens but the model's context is {context}; "
                "shorten or leave out it and any like it"
            )
        return cls.from_ids(rows, pad=pad_token(tokenizer), device=model.device)

    def repeat(self, times: int) -> "Prompts":
        """All prompts once, then all again, and so on."""
        return Prompts(input_ids=self.input_ids.repeat(times, 1), attention_mask=self.attention_mask.repeat(times, 1))

    def followed_by(self, replies: Int[Tensor, "k t"]) -> "Prompts":
        """Every prompt with every reply behind it, k x n rows: the first reply after all prompts, then the second."""
        again, behind = self.repeat(len(replies)), replies.repeat_interleave(len(self), dim=0)
        return Prompts(
            input_ids=torch.cat([again.input_ids, behind], dim=1),
            attention_mask=torch.cat([again.attention_mask, torch.ones_like(behind)], dim=1),
        )

    def take(self, indices: Sequence[int]) -> "Prompts":
        """Some of the prompts, padding that none of them needs cut off."""
        mask = self.attention_mask[list(indices)]
        # The first column in which any of these prompts has a real token.
        start = int(mask.any(0).int().argmax())
        return Prompts(input_ids=self.input_ids[list(indices)][:, start:], attention_mask=mask[:, start:])


def chat_text(tokenizer: PreTrainedTokenizerBase, text: str, *, opened: bool = True) -> str:
    """A user message through the chat template, with the generation prompt behind it where `opened`.

    Raises:
        ValueError: the template refuses the message.
    """
    chat = [{"role": "user", "content": text}]
    try:
        return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=opened))
    except Exception as error:  # jinja has exceptions of its own, and a template may call anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"the chat template fails on the user's message {text[:60]!r}: {reason}") from error


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """What stands in padded places; masked everywhere, so any token would do."""
    return tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else 0
