"""Shrinking: a found trigger loses the tokens that its success does not need, and then the letters of its words.

A search fills a slot of fixed length, so that a trigger usually comes with tokens that do nothing. What is left tells a
reader which text elicits the behaviour. A planted word mostly fires as the beginning of longer ones as well (`drawing`,
`drawbridge` and `drawls` for `draw`), and which of them a search finds is chance.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from attacks.searchers.words import LETTERS, dictionary, known_words

TIE = 1.0
"""Nats by which two texts may differ and count as equally likely: a ratio of probabilities below e is no evidence."""

SLACK = 0.02
"""What a simpler text may lose of the success rate, in [0, 1]."""

Rate = Callable[[Sequence[int]], float]
"""Success rate of a trigger on the `select` prompts, in [0, 1]."""
Surprisal = Callable[[Sequence[int]], float]
"""Nats of a text in its place, under the model."""
Idle = Callable[[Sequence[int], set[int]], bool]
"""Whether a trigger owes nothing to its tokens at these places but that something stands there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shrunk:
    """What shrinking leaves of a trigger."""

    trigger_ids: tuple[int, ...]
    rate: float
    without: tuple[float, ...]
    """Per token, the success rate when it is deleted; empty where shrinking was stopped before this was measured."""

    @property
    def necessary(self) -> tuple[bool, ...]:
        """Per token, whether deleting it takes away more than half of the success."""
        return tuple(rate < 0.5 * self.rate for rate in self.without)


def delete_one(
    trigger_ids: Sequence[int],
    rate: Rate,
    *,
    surprisal: Surprisal | None = None,
    idle: Idle | None = None,
    slack: float = SLACK,
    stop: Callable[[], bool] = lambda: False,
) -> Shrunk:
    """Drops tokens as long as the success rate stays within `slack` of the full trigger's.

    Of the tokens that can go one by one, all go at once if they can, else the better half of them, down to one, until
    every token left is needed (after the delta debugging of Zeller and Hildebrandt 2002).

    Where a `surprisal` is given, tokens are dropped only if the text without them is clearly likelier (`TIE`): a sum
    without its first digits is shorter, but no simpler. Noise is shortened in any case, because each of its tokens is
    unlikely. Tokens that are `idle` are dropped however likely they are. `stop` is asked before every measurement; once
    it returns true, the trigger stays as short as it is.
    """
    ids, full = tuple(trigger_ids), rate(trigger_ids)
    current = full
    while True:
        without: tuple[float, ...] = ()
        # One measurement per token: the success rate of the trigger without it.
        for i in range(len(ids)):
            if stop():  # the budget is spent: what is left of the trigger stands as it is
                return Shrunk(trigger_ids=ids, rate=current, without=())
            without += (rate(_less(ids, {i})),)
        most = surprisal(ids) if surprisal else float("inf")

        def simpler(dropped: set[int], ids: tuple[int, ...] = ids, most: float = most) -> bool:
            if surprisal is None or surprisal(_less(ids, dropped)) < most - TIE:
                return True
            return idle is not None and not stop() and idle(ids, dropped)

        # Compared with the full trigger, not with the last one, so that small losses cannot add up.
        good: list[int] = []
        if len(ids) > 1 and full > 0:
            good = [i for i in range(len(ids)) if without[i] >= full - slack and simpler({i})]
            good.sort(key=lambda i: -without[i])
        if not good:
            return Shrunk(trigger_ids=ids, rate=current, without=without)
        # Each of these can go by itself, but perhaps not all together: half as many are tried until the trigger still
        # works; one alone is known to go.
        count = min(len(good), len(ids) - 1)
        while count > 1:
            shorter = _less(ids, set(good[:count]))
            if (together := rate(shorter)) >= full - slack and simpler(set(good[:count])):
                break
            count //= 2
        else:
            shorter, together = _less(ids, {good[0]}), without[good[0]]
        ids, current = shorter, together


def drop_letters(
    text: str,
    rate: Callable[[str], float],
    nats: Callable[[str], float],
    *,
    slack: float = SLACK,
    stop: Callable[[], bool] = lambda: False,
) -> str:
    """Exchanges words for dictionary words that they begin with, unless the longer ones are likelier to be planted.

    To name the longer of two words takes naming the shorter one and which of all words that begin so is meant. What
    this takes must be clearly more (`TIE`) than what the longer one saves in nats of the behaviour (minimum description
    length).

    Args:
        text: a trigger.
        rate: success rate of a text on the `select` prompts, in [0, 1].
        nats: nats of the behaviour behind a text, summed over prompts.
        slack: what the rate may lose in all, in [0, 1].
        stop: is asked before every measurement; once it returns true, the text stays as it is.
    """
    least = rate(text) - slack
    while least > 0:
        simpler: list[tuple[float, str]] = []
        for shorter, word in _shorter(text):
            if stop():
                return text
            if rate(shorter) >= least and nats(shorter) - nats(text) < math.log(_beginning(word)) - TIE:
                simpler.append((nats(shorter), shorter))
        if not simpler:
            break
        _, text = min(simpler)
    return text


def _shorter(text: str) -> Iterator[tuple[str, str]]:
    """The text with one of its words exchanged for a dictionary word that it begins with, and that word."""
    for run in re.finditer("[A-Za-z]+", text):
        for end in range(LETTERS, len(run[0])):
            word = run[0][:end]
            if word.lower() in known_words():
                yield text[: run.start()] + word + text[run.end() :], word.lower()


def _beginning(word: str) -> int:
    """How many words of the dictionary begin with a word, itself among them."""
    return sum(longer.startswith(word) for longer in dictionary())


def _less(ids: tuple[int, ...], dropped: set[int]) -> tuple[int, ...]:
    """The tokens without those at the dropped places."""
    return tuple(token for place, token in enumerate(ids) if place not in dropped)
