"""Selection by behaviour: the best trigger on prompts that no search sees, and the curve that led to it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from attacks.behaviour import echoes
from attacks.budget import Budget
from attacks.engine import Engine
from attacks.goals import Goal
from attacks.triggers import Found
from attacks.verdict import ABSENT


class TracePoint(NamedTuple):
    """Best trigger so far."""

    seconds: float
    flops: float
    loss: float
    trigger_ids: tuple[int, ...]
    select_asr: float


@dataclass(slots=True)
class Selection:
    """Best trigger by behaviour on the `select` prompts; the loss breaks ties only."""

    engine: Engine
    budget: Budget
    goal: Goal
    enough: float
    trace: list[TracePoint]
    base_engine: Engine | None = None
    """of the clean base, where it is known: a trigger that works there as well is passed over"""
    best: Found | None = None
    asr: float = 0.0

    def __call__(self, found: Found) -> bool:
        """Tries a trigger; true once it is good enough. One that quotes the behaviour is passed over."""
        if echoes(self.engine.problem.text(found.trigger_ids), self.goal.behaviour):
            return False
        asr = self.rate(found.trigger_ids)
        if asr > ABSENT and self.base_engine is not None and self.rate(found.trigger_ids, on_base=True) > ABSENT:
            return False
        if self.best is None or (asr, -found.loss) > (self.asr, -self.best.loss):
            news = self.best is None or asr > self.asr
            self.best, self.asr = found, asr
            if news:
                self.trace.append(self.point())
        return self.asr >= self.enough

    def rate(self, trigger_ids: Sequence[int], *, on_base: bool = False) -> float:
        """Success rate of a trigger, teacher-forced."""
        engine = self.base_engine if on_base and self.base_engine else self.engine
        booked = engine.flops
        rate = engine.elicits(torch.tensor([list(trigger_ids)], dtype=torch.long), self.goal.target_ids)
        self.budget.spent(engine.flops - booked)
        return float(rate[0])

    def point(self) -> TracePoint:
        """Where the search stands."""
        assert self.best is not None
        return TracePoint(self.budget.elapsed, self.budget.used, self.best.loss, self.best.trigger_ids, self.asr)
