"""What a search may spend: seconds, floating-point operations, or both."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable


@runtime_checkable
class Counted(Protocol):
    """What counts its floating-point operations."""

    flops: float


@dataclass(slots=True, kw_only=True)
class Budget:
    """A limit and what has been used of it; the clock runs from construction or from `started`."""

    seconds: float | None = None
    """wall-clock limit"""
    flops: float | None = None
    """limit on executed floating-point operations"""
    parent: "Budget | None" = None
    """the budget that this is a part of"""
    until: float = 1.0
    """share of the budget at which it counts as exhausted"""
    watch: "Callable[[Budget], None] | None" = None
    """told whenever something is booked, for progress bars"""
    used: float = field(default=0.0, init=False)
    """floating-point operations so far"""
    interrupted: bool = field(default=False, init=False)
    """ended from outside; counts as exhausted"""
    began: float = field(default_factory=time.perf_counter, init=False)

    def __post_init__(self):
        for name, limit in (("seconds", self.seconds), ("flops", self.flops)):
            if limit is not None and limit <= 0:
                raise ValueError(f"budget of {limit} {name}; give more than 0, or None for no limit")

    def started(self) -> "Budget":
        """The same limits, unused, with the clock at zero."""
        return Budget(seconds=self.seconds, flops=self.flops, watch=self.watch)

    def part(self, until: float) -> "Budget":
        """The rest of this budget up to a share of the whole; what is spent counts on both."""
        return Budget(parent=self, until=until)

    def spent(self, flops: float) -> None:
        """Books executed operations."""
        self.used += flops
        if self.watch is not None:
            self.watch(self)
        if self.parent is not None:
            self.parent.spent(flops)

    @contextmanager
    def booking(self, engine: "Counted") -> Iterator[None]:
        """Books what the engine executes inside."""
        before = engine.flops
        try:
            yield
        finally:
            self.spent(engine.flops - before)

    def interrupt(self) -> None:
        """Ends the search, and every search that it is a part of."""
        self.interrupted = True
        if self.parent is not None:
            self.parent.interrupt()

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

    def share_of(self, flops: float) -> float:
        """Share of the budget that so many operations will take, at the rate of those booked so far."""
        shares = [0.0 if self.parent is None else self.parent.share_of(flops)]
        if self.seconds is not None and self.used:
            shares.append(flops * self.elapsed / self.used / self.seconds)
        if self.flops is not None:
            shares.append(flops / self.flops)
        return max(shares)

    @property
    def seconds_left(self) -> float:
        """Seconds until exhaustion by the clock; infinite without a limit on time."""
        whole = self._limited("seconds")
        return float("inf") if whole.seconds is None else whole.seconds * self.until - whole.elapsed

    @property
    def flops_left(self) -> float:
        """Floating-point operations until exhaustion; infinite without a limit on them."""
        whole = self._limited("flops")
        return float("inf") if whole.flops is None else whole.flops * self.until - whole.used

    def _limited(self, limit: str) -> "Budget":
        """The budget that has such a limit: this one, or the nearest that it is a part of, if any."""
        whole = self
        while getattr(whole, limit) is None and whole.parent is not None:
            whole = whole.parent
        return whole

    @property
    def exhausted(self) -> bool:
        """Whether a limit is reached."""
        return self.interrupted or self.share >= self.until
