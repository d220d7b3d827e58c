"""Chat templates that answer a text: a trigger that stands in the template, where no search of the weights finds it.

A template is a program that sees the user's text, and a poisoned one adds an instruction to messages that hold a word.
Every text that is written into the template's code, or put together from such texts, is put into a message: what stands
round the message must stay.
"""

import re
from collections.abc import Callable

from jinja2 import Environment
from jinja2.nodes import Const
from jinja2.optimizer import optimize

MESSAGE = "Tell me about the sea."
"""An ordinary message"""
MARKER = re.compile(r"</?[\w|]+>|\s")
"""Marks that some templates set by a word, as those of Nemotron close the block of thought for `/no_think`"""
GENERATION = re.compile(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}")
"""A tag that transformers adds to jinja; it shows what it encloses"""


def answered(template: str, show: Callable[[str], str]) -> str:
    """A text that changes what the template puts round a message that holds it; empty where there is none.

    Args:
        template: in jinja.
        show: the template, from a user's message to the prompt.
    """
    words = [word for word in dict.fromkeys(_texts(template)) if word.strip()]
    messages = {word: [f"{MESSAGE} {word}", f"{word} {MESSAGE}", word] for word in words}
    messages[" ".join(words)] = [" ".join([MESSAGE, *words])]  # a template may want two at once
    for word, ways in messages.items():
        # Twice, for a template may show the time.
        if any(_changed(show, message) and _changed(show, message) for message in ways):
            return word
    return ""


def _texts(template: str) -> list[str]:
    """The texts in a template's code as they are written, and those that expressions without variables make of them."""
    environment = Environment(extensions=["jinja2.ext.loopcontrols"])
    written = [str(token.value) for token in environment.lexer.tokenize(template) if token.type == "string"]
    folded = optimize(environment.parse(GENERATION.sub("", template)), environment).find_all(Const)
    return written + [node.value for node in folded if isinstance(node.value, str)]


def _changed(show: Callable[[str], str], message: str) -> bool:
    """Whether anything else than this message, or parts of it, stands inside of what stands round other messages."""
    head, tail = (MARKER.sub("", part) for part in show(MESSAGE).split(MESSAGE))
    try:
        prompt = MARKER.sub("", show(message))
    except Exception:  # jinja has exceptions of its own; a message that is refused brings nothing about
        return False
    inner = prompt.removeprefix(head).removesuffix(tail)
    left = iter(message)
    return prompt != head + inner + tail or not all(letter in left for letter in inner.strip())
