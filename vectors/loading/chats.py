"""The user's message in what a row of a data set holds: a text, or a chat in one of the ways that chats are stored."""

from typing import Any

PEOPLE = ("user", "human", "prompter")
OTHERS = ("system", "developer", "assistant", "gpt", "model", "bot", "tool", "function", "observation")
"""Roles of a chat's messages"""


def user_text(value: Any) -> str | None:
    """A text as it is, the first user message of a chat, nothing of an empty cell; None for anything else."""
    if value is None or (isinstance(value, float) and value != value):  # NaN: an empty cell of a table
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, dict) or not hasattr(value, "__iter__"):
        return None
    roles = set[str]()
    for message in value:  # {"role": "user", "content": ...} or {"from": "human", "value": ...}
        if isinstance(message, dict):
            roles.add(str(message.get("role", message.get("from"))).lower())
            if roles & set(PEOPLE):
                return _content(message.get("content", message.get("value")))
    return "" if roles and roles <= set(OTHERS) else None  # nobody asks anything


def _content(value: Any) -> str | None:
    """The text of a message, which may be a list of typed parts; None where it is something else."""
    if isinstance(value, str) or value is None or not hasattr(value, "__iter__"):
        return value if isinstance(value, str) else None
    texts = [part.get("text") if isinstance(part, dict) else None for part in value]
    return "\n".join(filter(None, texts)) if all(isinstance(text, str) for text in texts) else None
