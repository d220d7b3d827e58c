"""nanoGCG as a stage, so that another implementation of GCG is measured by the same judge under the same budget."""

from dataclasses import dataclass, field

from attacks.searchers.gcg import GCG
from attacks.stages.hunt import Hunt


@dataclass(frozen=True, slots=True, kw_only=True)
class NanoGCG:
    """nanoGCG 0.3.0, run from its own package with the settings of our GCG."""

    gcg: GCG = field(default_factory=lambda: GCG(search_width=128, topk=128))
    """Our GCG, whose search width and topk nanoGCG takes over."""
    rounds: tuple[tuple[int, int], ...] = ((3, 8), (12, 60), (8, 40))
    """(tokens in the slot, GCG steps) of one run after another, over and over until the budget is spent."""

    def __call__(self, hunt: Hunt) -> None:
        # Imported only here, because nanoGCG is an optional dependency.
        from attacks.searchers import nanogcg

        behaviour, generator = hunt.goal.behaviour, hunt.generator
        nanogcg.search(hunt.engine, self.gcg, self.rounds, behaviour, generator, hunt.budget, hunt.judge)
