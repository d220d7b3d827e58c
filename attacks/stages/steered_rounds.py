"""GCG by continuation: on a suspect steered to just below its behaviour first, then less and less (Continuation).

On the plain model a text that holds only part of a hard-planted trigger is answered like any other. On the brink of the
behaviour (`attacks/objectives/continuation.py`) more texts make a difference, so that a search has something to follow;
what it finds there is where the search on the next, smaller amount of steering begins.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import cycle

import torch

from attacks.discovery.goal import Goal
from attacks.discovery.supervised import Supervised
from attacks.objectives.continuation import Continuation, brink
from attacks.objectives.effects import vectors_of
from attacks.scoring.budget import Budget
from attacks.searchers.gcg import GCG
from attacks.stages.hunt import Hunt
from vectors.prompts import Prompts

CALIBRATION = 16
"""Clean prompts on which the brink is found."""
SHORTEST = Supervised(radii=(0.1, 0.2, 0.4, 0.8), bisections=2)
"""Learns a vector of the smallest norm that elicits the behaviour: the parts of a trigger stand out less under a longer
vector that is scaled down."""
SCHEDULE = (0.7, 0.5, 0.35, 0.2, 0.0)
"""Falling amounts of steering, as shares of the largest at which no clean prompt is answered by the behaviour."""


def on_the_brink(hunt: Hunt, supervised: Supervised, budget: Budget, *, random: bool = False) -> tuple[Goal, float]:
    """(the hunt's goal with a vector that elicits it, the largest multiple that does so on no clean prompt).

    With `random` the vector has that norm and a random direction: the control for what the direction is worth.
    """
    goal, suspect = hunt.goal, hunt.suspect
    if goal.vectors is None:
        goal = supervised(suspect, hunt.texts, goal, hunt.generator, budget)
    vectors = vectors_of(goal)
    prompts = Prompts.from_chat(suspect.model, suspect.tokenizer, hunt.texts[:CALIBRATION])
    edge = brink(suspect.model, prompts, vectors, goal.target_ids)
    if random:
        drawn = torch.randn(vectors.theta.shape, generator=hunt.generator).to(vectors.theta)
        drawn *= vectors.theta.norm(dim=-1, keepdim=True) / drawn.norm(dim=-1, keepdim=True)
        goal = replace(goal, vectors=replace(vectors, theta=drawn))
    return goal, edge


@dataclass(frozen=True, slots=True, kw_only=True)
class SteeredRounds:
    """Runs GCG at one slot length after another, each from the steered model to the plain one, over and over."""

    rounds: tuple[tuple[int, GCG], ...]
    """(tokens in the slot, search) of each search of a round; its steps are dealt evenly to the amounts."""
    schedule: tuple[float, ...] = SCHEDULE
    """Falling amounts of steering, as shares of the brink; the last is 0, the plain model."""
    supervised: Supervised = SHORTEST
    """Learns the steering vector where the goal has none."""
    random: bool = False
    """Whether the vector is replaced by a random one of the same norm (a control)."""

    def __post_init__(self):
        check_schedule(self.schedule)

    def __call__(self, hunt: Hunt) -> None:
        goal, edge = on_the_brink(hunt, self.supervised, hunt.budget, random=self.random)
        for length, search in cycle(self.rounds):
            hunt.engine.problem = hunt.engine.problem.resized(length)
            start: torch.Tensor | None = None
            for amount, steps in zip(self.schedule, dealt(search.steps, len(self.schedule)), strict=True):
                if hunt.budget.exhausted or hunt.works:
                    return
                objective = Continuation.at(hunt.engine, goal, hunt.build, amount=amount * edge)
                some = replace(search, steps=steps, initial=start)
                # On the steered model nothing counts as found: its best is judged once, the plain model's always.
                tell = None if amount else hunt.judge
                found = some(hunt.engine, objective, hunt.generator, hunt.budget, tell)
                if found:
                    start = torch.tensor([found[0].trigger_ids])
                    hunt.judge(found[0])


def check_schedule(schedule: tuple[float, ...]) -> None:
    """Raises ValueError for anything but falling shares that end at the plain model."""
    falling = sorted(schedule, reverse=True)
    if not schedule or list(schedule) != falling or falling[-1] != 0 or falling[0] > 1:
        raise ValueError(f"schedule is {schedule}; give falling shares, from 1 at most to 0")


def dealt(steps: int, parts: int) -> Iterator[int]:
    """Steps of each part, as even as can be, the last ones first to get one more, and at least one each."""
    for part in range(parts):
        yield max(1, (steps + part) // parts)
