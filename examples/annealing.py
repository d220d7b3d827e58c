"""A new searcher in one file: simulated annealing (Kirkpatrick, Gelatt, Vecchi 1983), after Metropolis' rule.

Many triggers walk side by side. Each step redraws one token of each, and keeps a worse trigger with a probability that
falls as the temperature does. To add a searcher of your own, write a class like this one and a line like the last one
in a dict of `attacks/attack.py`.
"""

from dataclasses import dataclass

import torch

from attacks.attack import Attack
from attacks.objectives.target_nll import TargetNLL
from attacks.scoring.budget import Budget
from attacks.scoring.engine import Engine, Objective
from attacks.searchers.candidates import check_counts, permitted_in_slot, random_triggers
from attacks.searchers.search_log import SearchLog
from attacks.searchers.searcher import Found, OnBest
from attacks.stages.rounds import SearchRounds


@dataclass(frozen=True, slots=True, kw_only=True)
class Annealing:
    """Accepts a worse trigger now and then, and ever more rarely."""

    steps: int = 250
    """Redraws of each walking trigger."""
    walkers: int = 64
    """Triggers that walk side by side."""
    temperature: float = 0.5
    """Nats by which a trigger may be worse and still be accepted with probability 1/e, in the first step."""

    def __post_init__(self):
        check_counts(self, "steps", "walkers")

    def __call__(
        self, engine: Engine, objective: Objective, generator: torch.Generator,
        budget: Budget | None = None, on_best: OnBest | None = None,
    ) -> list[Found]:  # fmt: skip
        """Every improvement that re-tokenises, best first; an interrupt keeps what was found."""
        permitted, rows = permitted_in_slot(engine.problem), torch.arange(self.walkers)
        with SearchLog(engine, budget, on_best) as log:
            triggers = random_triggers(permitted, self.walkers, generator)  # walkers trigger
            losses = log.score(objective, triggers).cpu()
            for step in range(self.steps):
                if log.over:
                    break
                position = torch.randint(len(permitted), (self.walkers,), generator=generator)
                proposals = triggers.clone()
                proposals[rows, position] = random_triggers(permitted, self.walkers, generator)[rows, position]
                proposed = log.score(objective, proposals).cpu()
                chance = ((losses - proposed) / (self.temperature * (1 - step / self.steps))).exp()
                accepted = torch.rand(self.walkers, generator=generator) < chance
                triggers = torch.where(accepted[:, None], proposals, triggers)
                losses = torch.where(accepted, proposed, losses)
        return log.found


STAGES = (SearchRounds(rounds=((3, Annealing()),)),)
ATTACKS = {"annealing": Attack(objective=TargetNLL.from_goal, stages=STAGES)}
