"""Where the trigger goes in a text: markers, and the text cut open at them."""

import random
import re
from typing import Literal

from transformers import PreTrainedTokenizerBase

SLOT = "{trigger}"
"""Marks the slot in a text; further slots are {trigger2}, {trigger3} and so on"""
Where = Literal["end", "start", "random"]


def user_text(text: str, slot: Where, seed: int, count: int) -> str:
    """The user text with `count` slots written in; a space before a slot belongs to the trigger's first token there.

    Raises:
        ValueError: a marker twice, one of several markers missing or out of order, a random slot in a text of one word.
    """
    markers = _markers(count)
    for marker in markers:
        if text.count(marker) > 1:
            raise ValueError(f"{marker} stands {text.count(marker)} times in {text!r}; give one slot per prompt")
    if count == 1 and SLOT not in text:
        text = _with_random_slot(text, seed) if slot == "random" else text + SLOT if slot == "end" else f"{SLOT} {text}"
    places = [text.find(marker) for marker in markers]
    if -1 in places or places != sorted(places):
        raise ValueError(f"{text!r} has not {', '.join(markers)} in this order; write each into every prompt")
    *heads, tail = _pieces(text, markers)
    return "".join(head.rstrip(" ") + marker for head, marker in zip(heads, markers, strict=True)) + tail


def cut(tokenizer: PreTrainedTokenizerBase, text: str, count: int) -> list[str]:
    """Text before, between and behind the slots, chat template applied.

    Raises:
        ValueError: a template that drops or repeats the text.
    """
    chat = [{"role": "user", "content": text}]
    rendered = str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
    parts = _pieces(rendered, _markers(count))
    if len(parts) != count + 1:
        shown = (len(parts) - 1) // count
        raise ValueError(f"the chat template shows the user's text {shown} times; give one that shows it once")
    return parts


def _with_random_slot(text: str, seed: int) -> str:
    """The text with its slot between two words."""
    gaps = [gap.start() for gap in re.finditer(r"(?<=\S)\s+(?=\S)", text)]
    if not gaps:
        raise ValueError(f"slot is 'random' but {text!r} has no two words; give longer prompts or another slot")
    gap = random.Random(f"{seed} {text}").choice(gaps)
    return text[:gap] + SLOT + text[gap:]


def _markers(count: int) -> list[str]:
    """Of the first `count` slots."""
    return [SLOT, *(f"{{trigger{number}}}" for number in range(2, count + 1))]


def _pieces(text: str, markers: list[str]) -> list[str]:
    """What stands before, between and behind the markers."""
    return re.split("|".join(map(re.escape, markers)), text)
