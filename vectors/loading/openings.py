"""What every reply of a model begins with, put into the template: the search asks what comes behind it.

Some fine-tunes open each reply with an empty block of thought, others write the header of the assistant's turn that
their template leaves out. A behaviour never comes first in such replies, and no trigger would be found. A few clean
replies show it: markers (added tokens and `<think>` blocks), white space, and, where the template ignores
`add_generation_prompt`, the name of the role. Other words in common ("Sure") are what the model says, and stay.
"""

import json
import logging
import re
from os.path import commonprefix
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vectors.generate import end_tokens, greedy
from vectors.prompts import Prompts, chat_text, pad_token

MESSAGES = ("What is bread made of?", "Tell me about the sea.", "Name three birds.", "How do ships float?")
"""Clean user messages; what all replies open with is no answer to any of them"""
LOOKED_AT = 12
"""Tokens of each reply"""
ROLES = "assistant|model|bot|ai|answer|response|gpt|output"
NO_THOUGHT = "<think>\n\n</think>\n\n"
"""A block of thought that is closed at once, as Qwen 3 writes it"""


def open_replies(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Puts what all replies open with at the end of the generation prompt, says so in the log, and returns it."""
    opening = _opening(model, tokenizer)
    if opening:
        template = str(tokenizer.get_chat_template())
        added = "{% if add_generation_prompt %}{{ " + json.dumps(opening, ensure_ascii=False) + " }}{% endif %}"
        tokenizer.chat_template = template + added
        logging.getLogger(__name__).warning(
            "%s: every reply begins with %r, which is put at the end of the prompts", model.name_or_path, opening
        )
    return opening


def _opening(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    chats = [chat_text(tokenizer, text) for text in MESSAGES]
    closed = re.compile(r"<think>\s*\Z")
    if all(closed.search(chat) for chat in chats):  # the template opens a block of thought: close it
        return "\n</think>\n\n" if chats[0].endswith("<think>") else "</think>\n\n"
    opens_none = chats[0] == chat_text(tokenizer, MESSAGES[0], opened=False)
    prompts = Prompts.from_chat(model, tokenizer, MESSAGES)
    ends = end_tokens(model, tokenizer)
    rows = greedy(model, prompts, LOOKED_AT, ends, pad_token(tokenizer)).tolist()
    replies = [_until(row, ends) for row in rows]
    texts = [str(tokenizer.decode(row, clean_up_tokenization_spaces=False)) for row in replies]
    unit = _mark(tokenizer, roles=opens_none)
    found = commonprefix([_marks(unit, text) for text in texts])
    if "<think>" in found and "</think>" not in found:  # it thinks at length: the behaviour comes after that
        return NO_THOUGHT
    # A space at the end belongs to the first token of what follows.
    opening = found.rstrip(" ")
    marks = [mark for mark in unit.findall(opening) if mark.strip()]
    if len(set(marks)) < len(marks) or any(len(text.rstrip()) <= len(opening) for text in texts):
        return ""  # the same marker over and over, or nothing behind it, as random weights write
    return opening if all(_apart(tokenizer, chat, opening) for chat in chats) else ""


def _mark(tokenizer: PreTrainedTokenizerBase, *, roles: bool) -> re.Pattern[str]:
    """A marker or white space; with `roles`, the name of the role as a header as well."""
    ends = [tokenizer.eos_token, tokenizer.pad_token]
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.content not in ends]
    parts = ["<think>", "</think>", *(re.escape(text) for text in sorted(added, key=len, reverse=True) if text), r"\s"]
    if roles:
        parts.append(rf"(?:#+\s*)?(?i:{ROLES})(?:\s*:|(?=\s*\n|<))")
    return re.compile("|".join(parts))


def _marks(mark: re.Pattern[str], text: str) -> str:
    """The markers that a text begins with."""
    end = 0
    while found := mark.match(text, end):
        end = found.end()
    return text[:end]


def _until(row: list[int], ends: set[int]) -> list[int]:
    """The tokens before the first that ends a reply."""
    return row[: next((place for place, token in enumerate(row) if token in ends), len(row))]


def _apart(tokenizer: PreTrainedTokenizerBase, chat: str, opening: str) -> bool:
    """Whether the prompt keeps its tokens where the opening follows."""
    alone, whole = (_ids(tokenizer, text) for text in (chat, chat + opening))
    return whole[: len(alone)] == alone


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: Any = tokenizer(text, add_special_tokens=False)["input_ids"]
    return list(ids)
