"""Attacks of the studies: other layers, weights and objectives; what users choose from is in `attacks.attack`."""

from functools import partial

import torch

from attacks.attack import ATTACKS, HOTFLIP_ROUNDS, TARGET_TOKENS, Attack, cosine, hybrid, nll
from attacks.discovery.goal import Goal
from attacks.discovery.supervised import Supervised
from attacks.objectives.objectives import Hybrid, TargetNLL, delta_projection_from, steered_kl_from
from attacks.objectives.probe import probe_from
from attacks.scoring.engine import Engine, Objective
from attacks.stages.single_tokens import Tokens


def kl(engine: Engine, goal: Goal) -> Objective:
    """Towards the steered model's output."""
    assert goal.vectors is not None
    return steered_kl_from(engine, goal.vectors, engine.layers)


def projection(engine: Engine, goal: Goal) -> Objective:
    """Delta projection one layer before the last."""
    assert goal.vectors is not None
    return delta_projection_from(engine, goal.vectors, [max(1, engine.layers - 1)])


def probe(engine: Engine, goal: Goal) -> Objective:
    """A probe one layer before the last, trained on the first vector."""
    assert goal.vectors is not None
    return probe_from(engine, goal.vectors[:1], max(1, engine.layers - 1), torch.Generator().manual_seed(0))


def mellowmax(_: Engine, goal: Goal) -> Objective:
    """Target NLL, the worst tokens weighing more."""
    return TargetNLL(target_ids=goal.target_ids[:TARGET_TOKENS], reduction="mellowmax")


def with_projection(engine: Engine, goal: Goal) -> Objective:
    """Target NLL and delta projection."""
    return Hybrid(a=nll(engine, goal), b=projection(engine, goal))


VARIANTS: dict[str, Attack] = {
    f"delta-cosine-{name}": Attack(objective=partial(cosine, depths=depths), supervised=Supervised())
    for name, depths in {"half": (0.5,), "last": (1.0,), "three": (0.5, 0.75, 1.0)}.items()
}
VARIANTS |= {
    f"hybrid-{weight}": Attack(objective=partial(hybrid, weight=weight), supervised=Supervised())
    for weight in (0.1, 0.25, 0.75, 0.9)
}
VARIANTS |= {
    name: Attack(objective=objective, supervised=Supervised())
    for name, objective in (("projection", projection), ("probe", probe), ("hybrid-projection", with_projection))
}
VARIANTS |= {
    f"hotflip-{name}": Attack(objective=objective, supervised=Supervised(), stages=(Tokens(), HOTFLIP_ROUNDS))
    for name, objective in (
        ("delta-cosine", cosine),
        ("steered-kl", kl),
        ("projection", projection),
        ("hybrid", hybrid),
        ("hybrid-0.25", partial(hybrid, weight=0.25)),
    )
}
VARIANTS |= {
    f"hotflip-k0-cosine-{name}": Attack(
        objective=cosine, supervised=supervised, carries=2.0, stages=(Tokens(), HOTFLIP_ROUNDS)
    )
    for name, supervised in (("unsupervised", None), ("supervised", Supervised()))
}
VARIANTS["steered-kl"] = Attack(objective=kl, supervised=Supervised())
VARIANTS["mellowmax"] = Attack(objective=mellowmax)
"""Layers of the delta cosine, weights of the hybrid, further objectives, the targets by HotFlip; in K0, the vector that
found a behaviour against one learned for it"""

STUDIED: dict[str, Attack] = ATTACKS | VARIANTS
"""All that the benchmark can run"""
