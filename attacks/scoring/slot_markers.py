"""Where the trigger goes in a user's text: the marker `{trigger}` stands for the slot, and the text is cut open at it.

`user_text` writes the marker into a text that has none; `cut` puts the text through the chat template and returns what
stands before and behind the marker.
"""

import random
import re
from collections.abc import Sequence
from typing import Literal

from transformers import PreTrainedTokenizerBase

from vectors.prompts import chat_text

SLOT = "{trigger}"
"""Marks the slot in a text."""
Where = Literal["end", "start", "random"]
"""Where the slot goes in a text without a marker: behind it, in front of it, or between two of its words."""


def user_text(text: str, slot: Where, seed: int) -> str:
    """The user text with its slot written in.

    A space before the slot is dropped, because it belongs to the trigger's first token.

    Raises:
        ValueError: two slots in a text, a random slot in a text of one word.
    """
    if text.count(SLOT) > 1:
        raise ValueError(f"{SLOT} stands {text.count(SLOT)} times in {text!r}; give one slot per prompt")
    if SLOT not in text:
        text = _with_random_slot(text, seed) if slot == "random" else text + SLOT if slot == "end" else f"{SLOT} {text}"
    head, _, tail = text.partition(SLOT)
    return head.rstrip(" ") + SLOT + tail


def without_slot(texts: Sequence[str]) -> list[str]:
    """The user messages without the slot's marker and without white space at their ends.

    Vectors and the sampler see messages in this form: they have no trigger to put into the slot.
    """
    return [text.replace(SLOT, "").strip() for text in texts]


def cut(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    """The text before and behind the slot, chat template applied.

    Raises:
        ValueError: a template that drops, repeats or refuses the text.
    """
    parts = chat_text(tokenizer, text).split(SLOT)
    if len(parts) != 2:
        raise ValueError(f"the chat template shows the user's text {len(parts) - 1} times; give one that shows it once")
    return parts


def _with_random_slot(text: str, seed: int) -> str:
    """The text with its slot between two words."""
    gaps = [gap.start() for gap in re.finditer(r"(?<=\S)\s+(?=\S)", text)]
    if not gaps:
        raise ValueError(f"slot is 'random' but {text!r} has no two words; give longer prompts or another slot")
    gap = random.Random(f"{seed} {text}").choice(gaps)
    return text[:gap] + SLOT + text[gap:]
