"""Delete-one shrinking: which tokens of a found trigger carry it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Rate = Callable[[Sequence[int]], float]
"""Success rate of a trigger on the `select` prompts, in [0, 1]"""


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


def delete_one(trigger_ids: Sequence[int], rate: Rate, *, slack: float = 0.02) -> Shrunk:
    """Drops the least useful token as long as the success rate stays within `slack` of the full trigger's."""
    ids, full = tuple(trigger_ids), rate(trigger_ids)
    current = full
    while True:
        without = tuple(rate(ids[:i] + ids[i + 1 :]) for i in range(len(ids)))
        best = max(range(len(ids)), key=lambda i: without[i], default=None)
        if best is None or len(ids) == 1 or full <= 0 or without[best] < full - slack:
            return Shrunk(trigger_ids=ids, rate=current, without=without)
        ids, current = ids[:best] + ids[best + 1 :], without[best]
