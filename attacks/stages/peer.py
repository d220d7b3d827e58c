"""nanoGCG as a stage, so that another implementation of GCG is measured by the same judge under the same budget."""

from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

from attacks.objectives.effects import vectors_of
from attacks.searchers.gcg import GCG
from attacks.stages.hunt import Hunt
from attacks.stages.steered_rounds import SHORTEST, check_schedule, dealt, on_the_brink


@dataclass(frozen=True, slots=True, kw_only=True)
class NanoGCG:
    """nanoGCG 0.3.0, run from its own package with the settings of our GCG."""

    gcg: GCG = field(default_factory=lambda: GCG(search_width=128, topk=128))
    """Our GCG, whose search width and topk nanoGCG takes over."""
    rounds: tuple[tuple[int, int], ...] = ((3, 8), (12, 60), (8, 40))
    """(tokens in the slot, GCG steps) of one run after another, over and over until the budget is spent."""

    schedule: tuple[float, ...] = (0.0,)
    """Falling amounts of steering, as shares of the brink of the behaviour, that the steps of a run are dealt to; by
    default the plain model all the way, as nanoGCG is used."""

    def __post_init__(self):
        check_schedule(self.schedule)

    def __call__(self, hunt: Hunt) -> None:
        # Imported only here, because nanoGCG is an optional dependency.
        from attacks.searchers import nanogcg

        moved = [nullcontext]
        if len(self.schedule) > 1:
            goal, edge = on_the_brink(hunt, SHORTEST, hunt.budget)
            vectors = vectors_of(goal)[:1]
            moved = [partial(vectors.apply, hunt.suspect.model, scale=amount * edge) for amount in self.schedule]
        runs = [
            nanogcg.Run(length, few, model, onward=place > 0)
            for length, steps in self.rounds
            for place, (few, model) in enumerate(zip(dealt(steps, len(moved)), moved, strict=True))
        ]
        nanogcg.search(hunt.engine, self.gcg, runs, hunt.goal.behaviour, hunt.generator, hunt.budget, hunt.judge)
