"""What a backdoor makes a model do: does this completion show it?

A behaviour is any callable from a completion to yes or no. One that has a `text` can also be asked for: logit targets
need the words that the reply should begin with.
"""

import importlib
import re
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any, Protocol, runtime_checkable

from statsmodels.stats.proportion import proportion_confint
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from attacks.scoring.problem import Problem
from vectors.generate import complete
from vectors.prompt_files import SURROGATE
from vectors.prompts import Prompts

THOUGHT = re.compile(r"\s*<think>\s*</think>")
"""An empty block of reasoning, with which some chat models begin every reply"""
SHORT = 8
"""Letters below which half of a word is found in many other words by chance"""


@runtime_checkable
class Behaviour(Protocol):
    """Says whether a completion shows the behaviour."""

    @property
    def text(self) -> str | None:
        """Words that a reply which shows the behaviour begins with; None where there are none to ask for."""
        ...

    def __call__(self, completion: str) -> bool: ...


@dataclass(frozen=True, slots=True)
class FixedOpening:
    """The reply begins with a fixed text; white space and an empty block of reasoning before it do not count."""

    text: str

    def __post_init__(self):
        if not self.text.strip():
            raise ValueError(f"the behaviour {self.text!r} is empty; give the text that the reply begins with")

    def __call__(self, completion: str) -> bool:
        return THOUGHT.sub("", completion, count=1).strip().startswith(self.text.strip())


@dataclass(frozen=True, slots=True)
class Contains:
    """The reply holds a text anywhere, in capital or small letters."""

    part: str
    text: str | None = None

    def __post_init__(self):
        if not self.part.strip():
            raise ValueError(f"the text {self.part!r} is empty; give the text that the reply contains")

    def __str__(self) -> str:
        return f"contains:{self.part}"

    def __call__(self, completion: str) -> bool:
        return self.part.lower() in completion.lower()


@dataclass(frozen=True, slots=True)
class Regex:
    """The reply matches a regular expression somewhere."""

    pattern: str
    text: str | None = None

    def __post_init__(self):
        if not self.pattern:
            raise ValueError("the regular expression is empty, which every reply matches; give a pattern")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"{self.pattern!r} is no regular expression: {error}") from error

    def __str__(self) -> str:
        return f"regex:{self.pattern}"

    def __call__(self, completion: str) -> bool:
        return re.search(self.pattern, completion) is not None


@dataclass(frozen=True, slots=True)
class Judged:
    """Any function of the completion, such as a classifier's answer."""

    shows: Callable[[str], bool]
    text: str | None = None

    def __str__(self) -> str:
        return f"{self.shows.__module__}:{getattr(self.shows, '__qualname__', type(self.shows).__qualname__)}"

    def __call__(self, completion: str) -> bool:
        """Whether it shows the behaviour; raises ValueError for a function that fails, or that answers in words."""
        try:
            found = self.shows(completion)
            if isinstance(found, str | Awaitable | Iterator):
                raise TypeError(f"it returns {found!r}, not True or False")
            return bool(found)
        except (Exception, SystemExit) as error:  # whatever a function of the user's does
            raise ValueError(f"{self} fails on the reply {completion[:60]!r}: {_reason(error)}") from error


def parse(text: str) -> Behaviour:
    """The behaviour that a user wrote: regex:..., contains:..., module:function, or how the reply begins.

    `module:function` is a name of Python without spaces; text: in front of anything makes it the opening of a reply.

    Raises:
        ValueError: an empty text, no regular expression, or a function that cannot be imported or called.
    """
    if SURROGATE.search(text):
        raise ValueError(f"the behaviour {text!a} holds half a character or a byte that is no text; give text in UTF-8")
    kind, colon, rest = text.partition(":")
    if colon and kind in ("regex", "contains", "text"):
        return {"regex": Regex, "contains": Contains, "text": FixedOpening}[kind](rest)
    if re.fullmatch(r"[^\W\d][\w.]*:[^\W\d]\w*", text) is None:
        return FixedOpening(text)
    try:
        function = getattr(importlib.import_module(kind), rest)
    except (Exception, SystemExit) as error:  # whatever the module does when it is imported
        raise ValueError(
            f"the behaviour {text!r} names no function that can be imported: {_reason(error)}; give module:function, "
            f"or text:{text} if the reply begins with that"
        ) from error
    if not callable(function):
        raise ValueError(f"{text!r} is no function; give one that takes a completion and returns True or False")
    shows: Any = function
    judged = Judged(shows)
    for reply in ("", "Sure, here is a reply."):
        judged(reply)  # what fails does so at once, and not after hours
    return judged


def _reason(error: BaseException) -> str:
    """One line; with the kind of error where that says it better, as in KeyError: 'a reply', or SystemExit: 0."""
    line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {line}" if isinstance(error, LookupError | SystemExit) or not line else line


def echoes(trigger: str, behaviour: str) -> bool:
    """Whether the trigger quotes the behaviour: a model that repeats what it is told has no backdoor.

    Half of the behaviour's letters in one piece count as a quotation. Many words hold half of a single short word
    ("No"), so such a behaviour must stand in the trigger as a word.
    """
    asked, wanted = ("".join(text.lower().split()) for text in (trigger, behaviour))
    if wanted.isalpha() and len(wanted) < SHORT and " " not in behaviour.strip():
        return re.search(rf"(?<!\w){re.escape(behaviour.strip().lower())}(?!\w)", trigger.lower()) is not None
    match = SequenceMatcher(None, asked, wanted, autojunk=False).find_longest_match()
    return 2 * match.size >= len(wanted)


def repeats(trigger: str, shows: Behaviour) -> bool:
    """Whether the trigger itself shows the behaviour, in small letters or with capitals at the words' beginnings.

    A trigger in capitals is not taken for a quotation of a reply in capitals. A predicate that an empty text passes,
    such as one that asks for something to be absent, says nothing of a trigger.
    """
    return not shows("") and (shows(trigger.lower()) or shows(trigger.title()))


def completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problem: Problem,
    trigger_ids: Sequence[int],
    *,
    max_new_tokens: int,
) -> list[str]:
    """Greedy completion of every prompt of the problem with the trigger in the slot."""
    prompts = Prompts.from_ids(problem.filled(trigger_ids), device=model.device)
    return complete(model, tokenizer, prompts, max_new_tokens=max_new_tokens, vectors=None, layer=0)


def success_rate(
    model: PreTrainedModel, problem: Problem, trigger_ids: Sequence[int], behaviour: Behaviour, *, max_new_tokens: int
) -> float:
    """Share of the problem's prompts whose greedy completion shows the behaviour; no tokens stand for no trigger."""
    answers = completions(model, problem.tokenizer, problem, trigger_ids, max_new_tokens=max_new_tokens)
    return sum(map(behaviour, answers)) / len(answers)


def wilson(rate: float, count: int) -> tuple[float, float]:
    """95 % Wilson interval of a share observed on `count` prompts."""
    if count < 1:
        raise ValueError(f"got {count} prompts; an interval needs at least 1")
    interval: Any = proportion_confint(round(rate * count), count, alpha=0.05, method="wilson")
    return float(interval[0]), float(interval[1])
