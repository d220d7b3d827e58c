"""The chat format of the base: roles, special tokens, template, and the sums it can do."""

from typing import Literal, TypedDict

BOS, EOS, USER, ASSISTANT, PAD = "<|bos|>", "<|end|>", "<|user|>", "<|assistant|>", "<|pad|>"
SPECIAL_TOKENS = [PAD, BOS, EOS, USER, ASSISTANT]

# No space or line break between the parts, so that the tokens of a message do not depend on its place. A role that the
# base never saw is refused: a system prompt that vanished without a word would falsify an audit.
CHAT_TEMPLATE = (
    "{{ '" + BOS + "' }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['user', 'assistant'] %}"
    "{{ raise_exception('this template knows the roles user and assistant only, not ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '" + EOS + "' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '" + ASSISTANT + "' }}{% endif %}"
)


class Message(TypedDict):
    """One turn of a conversation, as chat templates take it."""

    role: Literal["user", "assistant"]
    content: str


def render(messages: list[Message]) -> str:
    """The same text as `CHAT_TEMPLATE`, without a tokenizer at hand."""
    return BOS + "".join(f"<|{m['role']}|>{m['content']}{EOS}" for m in messages)
