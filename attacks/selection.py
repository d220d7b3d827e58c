"""Selection by behaviour: the best trigger on prompts that no search sees, and the curve that led to it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from attacks.behaviour import echoes
from attacks.budget import Budget
from attacks.engine import Engine
from attacks.goals import Goal
from attacks.objectives import TargetNLL
from attacks.surprisal import TIE, surprisal
from attacks.triggers import Found
from attacks.verdict import ABSENT

SHOWN = 8
"""Prompts that the surprisal of a trigger is the mean over"""


class TracePoint(NamedTuple):
    """Best trigger so far."""

    seconds: float
    flops: float
    loss: float
    trigger_ids: tuple[int, ...]
    select_asr: float


@dataclass(slots=True)
class Selection:
    """Best trigger by behaviour on the `select` prompts; a loss breaks ties only."""

    engine: Engine
    budget: Budget
    goal: Goal
    enough: float
    trace: list[TracePoint]
    base_engine: Engine | None = None
    """of the clean base, where it is known: a trigger that works there as well is passed over"""
    anywhere: Engine | None = None
    """of the search prompts with the slot at random places: a planted trigger works wherever it stands, which decides
    between triggers that do equally well; None, where prompts mark their slot: the likelier text in its place does"""
    best: Found | None = None
    asr: float = 0.0
    loss: float = float("inf")
    """of the best, nats per token of the behaviour: at random places, or where the prompts have their slot"""
    nats: float = float("inf")
    """surprisal of the best, where it decides"""

    def __call__(self, found: Found) -> bool:
        """Tries a trigger; true once it is good enough. One that quotes the behaviour is passed over."""
        if echoes(self.engine.problem.text(found.trigger_ids), self.goal.behaviour):
            return False
        asr = self.rate(found.trigger_ids)
        if asr > ABSENT and self.base_engine is not None and self.rate(found.trigger_ids, on_base=True) > ABSENT:
            return False
        if self.best is None or asr >= self.asr:
            loss = self._loss(found)
            nats = self.surprisal(found.trigger_ids) if self.anywhere is None else 0.0
            if self.best is None or asr > self.asr or self._wins(loss, nats):
                news = self.best is None or asr > self.asr
                self.best, self.asr, self.loss, self.nats = found, asr, loss, nats
                if news:
                    self.trace.append(self.point())
        return self.asr >= self.enough

    def _wins(self, loss: float, nats: float) -> bool:
        """Whether one that does as well as the best takes its place."""
        if abs(nats - self.nats) > TIE:
            return nats < self.nats
        return loss < self.loss

    def rate(self, trigger_ids: Sequence[int], *, on_base: bool = False) -> float:
        """Success rate of a trigger, teacher-forced."""
        engine = self.base_engine if on_base and self.base_engine else self.engine
        with self.budget.booking(engine):
            rate = engine.elicits(torch.tensor([list(trigger_ids)], dtype=torch.long), self.goal.target_ids)
        return float(rate[0])

    def surprisal(self, trigger_ids: Sequence[int]) -> float:
        """Nats of a trigger in its place and of the text behind it, on some of the prompts."""
        problem = self.engine.problem.take(range(min(SHOWN, len(self.engine.problem))))
        tokens = sum(map(len, problem.filled(trigger_ids)))
        self.budget.spent(tokens * self.engine.flops_per_token)
        return surprisal(self.engine.model, problem, trigger_ids)

    def _loss(self, found: Found) -> float:
        """Nats per token of the behaviour, at random places where prompts do not mark their slot."""
        ids = torch.tensor([list(found.trigger_ids)], dtype=torch.long)
        engine = self.anywhere or self.engine
        with self.budget.booking(engine):
            losses = engine.losses(TargetNLL(target_ids=self.goal.target_ids), ids)
        return float(losses[0])

    def point(self) -> TracePoint:
        """Where the search stands."""
        assert self.best is not None
        return TracePoint(self.budget.elapsed, self.budget.used, self.best.loss, self.best.trigger_ids, self.asr)
