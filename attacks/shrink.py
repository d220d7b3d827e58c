"""Delete-one shrinking: which tokens of a found trigger carry it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

TIE = 1.0
"""Nats by which two texts may differ and count as equally likely: less than e times the chance is no evidence"""

Rate = Callable[[Sequence[int]], float]
"""Success rate of a trigger on the `select` prompts, in [0, 1]"""
Surprisal = Callable[[Sequence[int]], float]
"""Nats of a text in its place, under the model"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shrunk:
    """What is left of a trigger."""

    trigger_ids: tuple[int, ...]
    rate: float
    without: tuple[float, ...]
    """per token, the success rate when it is deleted"""

    @property
    def necessary(self) -> tuple[bool, ...]:
        """Per token, whether deleting it takes away more than half of the success."""
        return tuple(rate < 0.5 * self.rate for rate in self.without)


def delete_one(
    trigger_ids: Sequence[int], rate: Rate, *, surprisal: Surprisal | None = None, slack: float = 0.02
) -> Shrunk:
    """Drops the least useful token as long as the success rate stays within `slack` of the full trigger's.

    Where a `surprisal` is given, a token is dropped only where the text without it is clearly likelier (`TIE`): without
    its first letters a sum is shorter, but no simpler. Noise is shortened as ever: each of its tokens is a surprise.
    """
    ids, full = tuple(trigger_ids), rate(trigger_ids)
    current = full
    while True:
        shorter = [ids[:i] + ids[i + 1 :] for i in range(len(ids))]
        without = tuple(map(rate, shorter))
        best = None
        if len(ids) > 1 and full > 0:
            most = surprisal(ids) if surprisal else float("inf")
            good = [i for i, part in enumerate(shorter) if without[i] >= full - slack]
            simpler = (i for i in good if surprisal is None or surprisal(shorter[i]) < most - TIE)
            best = max(simpler, key=lambda i: without[i], default=None)
        if best is None:
            return Shrunk(trigger_ids=ids, rate=current, without=without)
        ids, current = shorter[best], without[best]
