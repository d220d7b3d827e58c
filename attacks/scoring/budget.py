"""What a search may spend: seconds, floating-point operations, or both."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from vectors.operations import executed

PAUSE = 0.2
"""Seconds between two reports to a progress bar"""


@dataclass(slots=True, kw_only=True)
class Budget:
    """A limit, and how much of it is used; both clocks run from construction or from `started`.

    Seconds are wall-clock time. Operations are read off `vectors.operations`, which counts what every model executes.
    """

    seconds: float | None = None
    """Limit on wall-clock time, in seconds; None: no limit."""
    flops: float | None = None
    """Limit on executed floating-point operations; None: no limit."""
    parent: "Budget | None" = None
    """The budget that this one is a part of."""
    until: float = 1.0
    """Share of the budget, in (0, 1], at which it counts as exhausted."""
    watch: "Callable[[Budget], None] | None" = None
    """Told now and then how far the budget is used, for progress bars."""
    begins: "Callable[[Budget, str, str, float], None] | None" = None
    """Told what the budget goes into from now on: the name of the part, the best text so far, and its success rate."""
    interrupted: bool = field(default=False, init=False)
    """Ended from outside (Ctrl-C, SIGTERM); counts as exhausted."""
    began: float = field(default_factory=time.perf_counter, init=False)
    began_flops: float = field(default_factory=executed, init=False)
    completing: float = field(default=0.0, init=False)
    """Seconds that an operation takes in completions, token by token; 0: not measured."""
    paced: tuple[float, float] = field(default=(0.0, 0.0), init=False)
    """Seconds of a short completion, and the share of the budget, in [0, 1], that was used when it was timed."""
    _rated: tuple[float, float] = field(default=(0.0, 0.0), init=False)
    """Seconds and operations since the start from which on the rate of other work is taken."""
    _told: float = field(default=0.0, init=False)

    def __post_init__(self):
        for name, limit in (("seconds", self.seconds), ("flops", self.flops)):
            if limit is not None and not 0 < limit < math.inf:
                raise ValueError(f"budget of {limit} {name}; give a finite number above 0, or leave it out")

    def started(self) -> "Budget":
        """The same limits, unused, with both clocks at zero."""
        return Budget(seconds=self.seconds, flops=self.flops, watch=self.watch, begins=self.begins)

    def part(self, until: float) -> "Budget":
        """The rest of this budget up to a share of the whole."""
        return Budget(parent=self, until=until)

    def of_rest(self, part: float) -> "Budget":
        """That part, in (0, 1], of what is left of this budget."""
        return self.part(self.share + part * (self.until - self.share))

    def interrupt(self) -> None:
        """Ends the search, and every search that it is a part of."""
        self.interrupted = True
        if self.parent is not None:
            self.parent.interrupt()

    @property
    def used(self) -> float:
        """Operations executed since the start."""
        return executed() - self.began_flops

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.began

    @property
    def share(self) -> float:
        """Fraction of the budget used, of the limit that is closest; 0 without limits."""
        shares = [0.0 if self.parent is None else self.parent.share]
        if self.seconds is not None:
            shares.append(self.elapsed / self.seconds)
        if self.flops is not None:
            shares.append(self.used / self.flops)
        return max(shares)

    def measured(self, flops: float, seconds: float) -> None:
        """Takes note of how long completions of so many operations last; other work is timed from now on."""
        self.completing = seconds / flops
        self._rated = self.elapsed, self.used

    def share_of(self, flops: float, *, completing: bool = False) -> float:
        """Share of the budget that so many operations will take, at the rate of those executed so far.

        With `completing` they are those of completions, whose rate is what `measured` was told, if it was.
        """
        shares = [0.0 if self.parent is None else self.parent.share_of(flops, completing=completing)]
        if self.seconds is not None:
            seconds, flops_done = self.elapsed - self._rated[0], self.used - self._rated[1]
            if completing and self.completing:
                shares.append(flops * self.completing / self.seconds)
            elif flops_done:
                shares.append(flops * seconds / flops_done / self.seconds)
        if self.flops is not None:
            shares.append(flops / self.flops)
        return max(shares)

    @property
    def seconds_left(self) -> float:
        """Seconds until exhaustion by the clock; infinite without a limit on time."""
        whole = self._limited("seconds")
        return math.inf if whole.seconds is None else whole.seconds * self.until - whole.elapsed

    @property
    def flops_left(self) -> float:
        """Operations until exhaustion; infinite without a limit on them."""
        whole = self._limited("flops")
        return math.inf if whole.flops is None else whole.flops * self.until - whole.used

    def _limited(self, limit: str) -> "Budget":
        """The budget that has such a limit: this one, or the nearest that it is a part of, if any."""
        whole = self
        while getattr(whole, limit) is None and whole.parent is not None:
            whole = whole.parent
        return whole

    @property
    def exhausted(self) -> bool:
        """Whether a limit is reached. Every stage asks this often, so a progress bar is told here."""
        self._tell()
        return self.stopped or self.share >= self.until

    @property
    def stopped(self) -> bool:
        """Whether this budget, or one that it is a part of, was ended from outside."""
        return self.interrupted or (self.parent is not None and self.parent.stopped)

    def _tell(self) -> None:
        """Reports progress, at most every PAUSE seconds."""
        if self.parent is not None:
            self.parent._tell()
        elif self.watch is not None and self.elapsed - self._told >= PAUSE:
            self._told = self.elapsed
            self.watch(self)
