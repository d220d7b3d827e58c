"""Selection by behaviour: the best trigger on prompts that no search sees, and the curve that led to it.

Of triggers that do equally well, the one that explains most with least: minimum description length (Rissanen 1978).
What takes the fewest nats to write down, as text of its place, together with the behaviour that it then calls on every
prompt. A planted trigger calls the behaviour most surely wherever it stands; words beat noise; where prompts were
learned too, the trigger is ordinary text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from attacks.behaviour import echoes
from attacks.discovery.goals import Goal
from attacks.judging.description_length import surprisal
from attacks.judging.verdict import ABSENT
from attacks.objectives.target_nll import TargetNLL
from attacks.scoring.budget import Budget
from attacks.scoring.engine import Engine
from attacks.searchers.candidates import Found

SURE = 0.5
"""Nats of the whole behaviour, mean over prompts, up to which a trigger counts as sure of it. Planted ones take up to
0.33; most of what fires beside them takes 0.6 or more, a word of the same sense as little as they do"""
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
    """Best trigger by behaviour on the `select` prompts; its description length breaks ties."""

    engine: Engine
    budget: Budget
    goal: Goal
    enough: float
    trace: list[TracePoint]
    base_engine: Engine | None = None
    """of the clean base, where it is known: a trigger that works there as well is passed over"""
    anywhere: Engine | None = None
    """of all prompts with the slot at random places, where they do not mark theirs: what a trigger calls is measured
    there"""
    best: Found | None = None
    asr: float = 0.0
    description: float = float("inf")
    """description length of the best, nats"""
    _rates: dict[tuple[Engine, tuple[int, ...]], float] = field(default_factory=dict, init=False)
    _surprisals: dict[tuple[int, ...], float] = field(default_factory=dict, init=False)
    _known_nats: dict[tuple[int, ...], float] = field(default_factory=dict, init=False)

    def __call__(self, found: Found) -> bool:
        """Tries a trigger; true once it is good enough. One that quotes the behaviour is passed over."""
        if echoes(self.engine.problem.text(found.trigger_ids), self.goal.behaviour):
            return False
        asr = self.rate(found.trigger_ids)
        if asr > ABSENT and self.base_engine is not None and self.rate(found.trigger_ids, on_base=True) > ABSENT:
            return False
        if self.best is None or asr >= self.asr:
            # Of triggers that hardly ever work none is worth describing.
            description = self._description(found.trigger_ids) if asr > ABSENT else float("inf")
            if self.best is None or asr > self.asr or description < self.description:
                news = self.best is None or asr > self.asr
                self.best, self.asr, self.description = found, asr, description
                if news:
                    self.trace.append(self.point())
        return self.asr >= self.enough

    def rate(self, trigger_ids: Sequence[int], *, on_base: bool = False) -> float:
        """Success rate of a trigger, teacher-forced."""
        engine = self.base_engine if on_base and self.base_engine else self.engine
        return self._rate(engine, trigger_ids)

    def sure(self, trigger_ids: Sequence[int]) -> bool:
        """Whether a trigger calls the behaviour as surely as a planted one does, at random places as well."""
        return self._nats(trigger_ids) <= SURE

    def _nats(self, trigger_ids: Sequence[int]) -> float:
        """Of the whole behaviour behind a trigger, mean over prompts."""
        engine, target, key = self.anywhere or self.engine, self.goal.target_ids, tuple(trigger_ids)
        if key not in self._known_nats:
            with self.budget.booking(engine):
                losses = engine.losses(TargetNLL(target_ids=target), torch.tensor([key], dtype=torch.long))
            self._known_nats[key] = len(target) * float(losses[0])
        return self._known_nats[key]

    def _rate(self, engine: Engine, trigger_ids: Sequence[int]) -> float:
        """Measured once: shrinking asks for the same texts again."""
        key = engine, tuple(trigger_ids)
        if key not in self._rates:
            with self.budget.booking(engine):
                rate = engine.elicits(torch.tensor([key[1]], dtype=torch.long), self.goal.target_ids)
            self._rates[key] = float(rate[0])
        return self._rates[key]

    def surprisal(self, trigger_ids: Sequence[int]) -> float:
        """Nats of a trigger in its place and of the text behind it, on some of the prompts; measured once."""
        key = tuple(trigger_ids)
        if key not in self._surprisals:
            problem = self.engine.problem.take(range(min(SHOWN, len(self.engine.problem))))
            self.budget.spent(sum(map(len, problem.filled(key))) * self.engine.flops_per_token)
            self._surprisals[key] = surprisal(self.engine.model, problem, key)
        return self._surprisals[key]

    def _description(self, trigger_ids: Sequence[int]) -> float:
        """Nats of a trigger in its place, and of the behaviour behind it on every prompt."""
        return self.surprisal(trigger_ids) + len((self.anywhere or self.engine).problem) * self._nats(trigger_ids)

    def point(self) -> TracePoint:
        """Where the search stands."""
        assert self.best is not None
        return TracePoint(self.budget.elapsed, self.budget.used, self.best.loss, self.best.trigger_ids, self.asr)
