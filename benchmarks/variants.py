"""Attacks of the studies: other layers, weights and objectives; what users choose from is in `attacks.attack`."""

from functools import partial

from attacks.attack import ATTACKS, HOTFLIP_ROUNDS, Attack, cosine, gcg, hybrid, nll
from attacks.discovery.supervised import Supervised
from attacks.objectives.delta_projection import DeltaProjection
from attacks.objectives.probe import Probe
from attacks.objectives.steered_kl import SteeredKL
from attacks.objectives.target_nll import TargetNLL
from attacks.stages.continuation_beam import ContinuationBeam
from attacks.stages.peer import NanoGCG
from attacks.stages.single_tokens import SingleTokens
from attacks.stages.steered_rounds import SCHEDULE, SteeredRounds
from attacks.stages.words.word_substitution import WordSubstitution

# Objectives that only studies use; those that users choose from are in `attacks.attack`.
kl = SteeredKL.from_goal
projection = DeltaProjection.from_goal
probe = Probe.from_goal
STEERED = ((3, gcg(8)), (12, gcg(60)), (8, gcg(40)))  # the rounds of GCG that every target gets
mellowmax = partial(TargetNLL.from_goal, reduction="mellowmax")

# Which layers' change to follow: half-way, the last, or three depths at once.
VARIANTS: dict[str, Attack] = {
    f"delta-cosine-{name}": Attack(objective=partial(cosine, depths=depths), supervised=Supervised())
    for name, depths in {"half": (0.5,), "last": (1.0,), "three": (0.5, 0.75, 1.0)}.items()
}
VARIANTS |= {
    f"hybrid-{weight}": Attack(objective=partial(hybrid, weight=weight), supervised=Supervised())
    for weight in (0.25, 0.75)
}
VARIANTS |= {
    # The targets once more, by HotFlip in place of GCG and with the same stages for all: only the target differs.
    f"hotflip-{name}": Attack(objective=objective, supervised=Supervised(), stages=(SingleTokens(), HOTFLIP_ROUNDS))
    for name, objective in (
        ("delta-cosine", cosine),
        ("steered-kl", kl),
        ("projection", projection),
        ("hybrid-0.25", partial(hybrid, weight=0.25)),
    )
}
VARIANTS |= {
    f"hotflip-k0-cosine-{name}": Attack(
        # `carries` above 1: a discovered vector never counts as good enough, so that `supervised` alone decides which
        # one is used.
        objective=cosine,
        supervised=supervised,
        carries=2.0,
        stages=(SingleTokens(), HOTFLIP_ROUNDS),
    )
    for name, supervised in (("unsupervised", None), ("supervised", Supervised()))
}
VARIANTS |= {
    name: Attack(objective=objective, supervised=Supervised())
    for name, objective in (("probe", probe), ("steered-kl", kl))
}
VARIANTS |= {
    name: Attack(objective=nll, stages=(SingleTokens(), beam), last=(WordSubstitution(),))
    for name, beam in (
        ("continuation-beam", ContinuationBeam(share=1.0)),
        # The control: the same search on the plain model all the way.
        ("continuation-beam-unsteered", ContinuationBeam(share=1.0, schedule=(0.0,) * 6)),
    )
}
VARIANTS |= {
    # Logits of the steered model as a target: the same GCG, on the model steered to the brink first and less and less.
    # The controls: a random vector of the same norm, and a peer's search in the same wrapper.
    "steered-nll": Attack(objective=nll, stages=(SingleTokens(), SteeredRounds(rounds=STEERED))),
    "steered-nll-random": Attack(objective=nll, stages=(SingleTokens(), SteeredRounds(rounds=STEERED, random=True))),
    "nanogcg-steered": Attack(objective=nll, stages=(NanoGCG(schedule=SCHEDULE),)),
}
VARIANTS["mellowmax"] = Attack(objective=mellowmax)
"""Layers of the delta cosine, weights of the hybrid, further objectives, the targets by HotFlip; in K0, the vector that
found a behaviour against one learned for it; searches by continuation"""

STUDIED: dict[str, Attack] = ATTACKS | VARIANTS
"""All that the benchmark can run"""
