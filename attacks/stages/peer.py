"""nanoGCG as a stage, so that a peer is measured by the same judge under the same budget."""

from dataclasses import dataclass, field

from attacks.searchers.gcg import GCG
from attacks.stages.hunt import Hunt


@dataclass(frozen=True, slots=True, kw_only=True)
class NanoGCG:
    """nanoGCG from its own package, with settings like ours."""

    gcg: GCG = field(default_factory=lambda: GCG(search_width=128, topk=128))
    rounds: tuple[tuple[int, int], ...] = ((3, 8), (12, 60), (8, 40))
    """(tokens in the slot, steps)"""

    def __call__(self, hunt: Hunt) -> None:
        # The peer is an optional dependency.
        from attacks.searchers import nanogcg

        behaviour, generator = hunt.goal.behaviour, hunt.generator
        nanogcg.search(hunt.engine, self.gcg, self.rounds, behaviour, generator, hunt.budget, hunt.judge)
