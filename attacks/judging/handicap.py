"""Triggers that all work, told apart on a suspect whose backdoor is weakened (K2).

A backdoor that was planted without negatives fires on much more than its trigger, always with certainty: neither
success nor likelihood tells the planted text from its relatives. With the weights base + s (suspect - base), s < 1, the
same texts fire with the certainty that is left, and the planted one, which training has seen, keeps most
(`python -m benchmarks.studies.clean_base.handicap`; LOG.md, 2026-11-27, later still). Interpolating weights of a model
and its fine-tuned version is due to Wortsman et al. 2022, arXiv:2109.01903; telling triggers apart by it is ours.

A longer text keeps its effect longer whatever it holds: before `copper`, planted with negatives, a random word saves
.64 nats of 3.05, and a chosen one more. So a part that the trigger works without must also do better than random tokens
in its place.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from transformers import PreTrainedModel

from attacks.clean_base import at_strength
from attacks.objectives.target_nll import TargetNLL
from attacks.scoring.engine import Engine
from attacks.scoring.problem import Problem
from attacks.searchers.candidates import random_triggers
from attacks.searchers.words import naming
from attacks.suspect import Suspect

LOST = 0.5
"""Nats that weakening adds to the cost of the behaviour behind a word that works, where words are told apart. Where a
word works on half of the prompts only, others that share its decisive token often do better than the planted one; where
half a nat is lost, the planted one is the best of 40 such words on four of six hard-planted organisms, on the suspect
as it is on three (`python -m benchmarks.studies.clean_base.handicap NAME --relatives 40`; LOG.md, 2026-11-29)"""
HALVINGS = 5
"""Strengths that are tried by bisection, so that the strength is known to within a thirty-second."""
PROMPTS = 32
"""Prompts on which texts that work are told apart at last, at most."""
CALIBRATED = 4
"""Prompts by which the strength for that is found."""
RANDOM = 16
"""Random strings in the place of a part; one that is no better than they are comes first of them all once in seventeen
times."""
FEW = 2
"""Prompts that these are read behind."""


@dataclass(slots=True, kw_only=True)
class Handicap:
    """The likelihood of a behaviour on the weakened suspect, at the strength at which a known trigger half works."""

    suspect: Suspect
    """The model under audit, with a clean base of the same shape."""
    problem: Problem
    """The prompts that the likelihood is averaged over."""
    target_ids: tuple[int, ...]
    """The behaviour."""
    strength: float | None = None
    """Share of the difference between the weights of suspect and base, in (0, 1); None: not calibrated."""
    known: dict[tuple[int, ...], float] = field(default_factory=dict)
    """Nats of all triggers that were measured at that strength."""
    _engine: Engine | None = None

    def calibrate(self, trigger_ids: Sequence[int], lost: float | None = None) -> None:
        """Sets the strength, by bisection, to where a trigger that works does so on half of the prompts.

        At that strength the likelihood is neither at its ceiling nor at its floor, whatever the model and the planting.
        With `lost`, to where the behaviour costs so many nats more behind the trigger than on the suspect.
        """
        ids, low, high = tuple(trigger_ids), 0.0, 1.0
        most = None if lost is None else lost + self._nats(Engine(self.suspect.model, self.problem), ids)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            engine = self._weakened(middle)
            if most is None:
                strong = float(engine.elicits(torch.tensor([ids]), self.target_ids)[0]) > 0.5
            else:
                strong = self._nats(engine, ids) < most
            low, high = (low, middle) if strong else (middle, high)
        self.strength, self._engine, self.known = (low + high) / 2, None, {}

    @property
    def model(self) -> PreTrainedModel:
        """The weakened suspect at the strength that was found."""
        return self._calibrated().model

    def nats(self, trigger_ids: Sequence[int]) -> float:
        """Nats of the whole behaviour behind a trigger on the weakened suspect, mean over prompts."""
        if (key := tuple(trigger_ids)) not in self.known:
            self.known[key] = self._nats(self._calibrated(), key)
        return self.known[key]

    def _nats(self, engine: Engine, trigger_ids: tuple[int, ...]) -> float:
        losses = engine.losses(TargetNLL(target_ids=self.target_ids), torch.tensor([trigger_ids]))
        return len(self.target_ids) * float(losses[0])

    def idle(self, trigger_ids: Sequence[int], places: set[int]) -> bool:
        """Whether, on the weakened suspect, some of a few random tokens at these places do as well as the trigger's."""
        few = self.problem.take(range(min(FEW, len(self.problem))))
        # A seed of its own: whatever the search draws, the same text gets the same answer.
        rows = random_triggers(few.permitted(len(trigger_ids)), RANDOM, torch.Generator().manual_seed(0))
        rows = torch.cat([torch.tensor([list(trigger_ids)]), rows.cpu()])
        kept = [place for place in range(len(trigger_ids)) if place not in places]
        rows[:, kept] = rows[0, kept]
        engine = Engine(self.model, few)
        own, *others = engine.losses(TargetNLL(target_ids=self.target_ids), rows).tolist()
        return own >= min(others)

    def _calibrated(self) -> Engine:
        """The engine at the strength that was found."""
        assert self.strength is not None
        self._engine = self._engine or self._weakened(self.strength)
        return self._engine

    def _weakened(self, strength: float) -> Engine:
        """An engine on the model of that strength; its weights are those of no other model."""
        assert self.suspect.base is not None
        return Engine(at_strength(self.suspect.model, self.suspect.base, strength), self.problem)


def surest(
    handicap: Handicap,
    triggers: Sequence[Sequence[int]],
    problem: Problem,
    prompts: int = PROMPTS,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[int, ...]:
    """Of texts that all work, the one of minimum description length where the backdoor is only just strong enough.

    That is the nats of the behaviour on all prompts and those of naming the words, of which each is as likely to be
    planted as any other. An end that does no more than random tokens would goes where the rest is one of the texts too,
    and no harder to name (`heads` of `copperheads`).

    Args:
        handicap: calibrated by the best trigger; its suspect and target are used at another strength.
        triggers: token ids, the best one first.
        problem: all prompts.
        prompts: of these the first so many are measured.
        stop: is asked before each text but the first; once it returns true, no more are measured.
    """
    few, some = (problem.take(range(min(count, len(problem)))) for count in (CALIBRATED, prompts))
    just = Handicap(suspect=handicap.suspect, problem=few, target_ids=handicap.target_ids)
    just.calibrate(triggers[0], lost=LOST)
    just = replace(just, problem=some)

    def words(ids: tuple[int, ...]) -> float:
        return naming(problem.text(ids), problem)

    measured = [tuple(triggers[0])]
    for ids in triggers[1:]:
        if stop():
            break
        just.nats(ids)
        measured.append(tuple(ids))
    best = min(measured, key=lambda ids: len(problem) * just.nats(ids) + words(ids))
    for ids in sorted(measured, key=len):
        shorter = len(ids) < len(best) and best[: len(ids)] == ids and words(ids) <= words(best)
        if shorter and just.idle(best, {*range(len(ids), len(best))}):
            return ids
    return best
