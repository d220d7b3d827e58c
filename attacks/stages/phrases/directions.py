"""Directions of the residual stream, at the tokens of a text, that the likelihood of a behaviour depends on.

They are the active subspace of the likelihood (Constantine, Dow & Wang 2014, arXiv:1304.2070): with g its gradient by
the residual, C = E[g g'] tells for any small change x of the residual how much it matters, x' C x. Here g has unit
length, so that texts with a steep likelihood do not decide alone. The mean is over random strings, behind which the
behaviour is far, and over what a short search makes of such strings, behind which it is near; half of it each.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedModel

from attacks.discovery.comparison import Ids
from attacks.objectives.target_nll import TARGET_TOKENS, TargetNLL
from attacks.scoring.budget import Budget
from attacks.scoring.engine import Engine
from attacks.scoring.planning import trigger_flops
from attacks.scoring.problem import Problem
from attacks.scoring.residual_gradient import residual_gradient
from attacks.searchers.candidates import permitted_in_slot, random_triggers
from attacks.searchers.hotflip import HotFlip

TOKENS = 4
"""In each string: a search for more of them takes longer"""
STRINGS = 64
"""Random strings"""
SEARCHES = 6
"""Short searches from other random strings"""
KEPT = 32
"""Directions, at most; on three organisms of width 192 these held .92 of the trace of C"""
SEARCH = HotFlip(steps=5)
"""Sweeps until a string of four tokens improves little"""


def directions(
    engine: Engine, target_ids: Sequence[int], layer: int, generator: torch.Generator, budget: Budget
) -> Float[Tensor, "d_model k"]:
    """Maps a change of the residual, x, to coordinates in which its length tells how much it matters to the behaviour.

    That is the square root of C, so that |x @ it| squared is x' C x, without a unit, up to the `KEPT` directions that
    matter most; zero where no gradient is finite.

    Args:
        engine: runs the suspect on some prompts, of which the first is used for gradients.
        target_ids: the behaviour.
        layer: after how many blocks the residual is looked at.
        generator: draws the strings.
        budget: asked between forward passes of the searches.
    """
    problem, target = engine.problem.resized(TOKENS), tuple(target_ids[:TARGET_TOKENS])
    permitted, searching = permitted_in_slot(problem), Engine(engine.model, problem)
    search = replace(SEARCH, topk=min(SEARCH.topk, int(permitted.any(0).sum())))
    strings = [tuple(row) for row in random_triggers(permitted, STRINGS, generator).tolist()]
    searched = (search(searching, TargetNLL(target_ids=target), generator, budget) for _ in range(SEARCHES))
    near = [found[0].trigger_ids for found in searched if found]
    one = Engine(engine.model, problem.take([0]))
    second = sum(_second_moment(one, target, layer, texts) for texts in (strings, near or strings))
    values, vectors = torch.linalg.eigh(second)
    return (vectors * values.clamp_min(0).sqrt())[:, -KEPT:]


def directions_flops(model: PreTrainedModel, problem: Problem) -> float:
    """About what `directions` costs: nearly all of it are the searches."""
    scored = SEARCHES * SEARCH.steps * TOKENS * (SEARCH.topk + 1)
    return scored * trigger_flops(model, problem, float(TOKENS), TARGET_TOKENS)


def _second_moment(engine: Engine, target: Ids, layer: int, texts: Sequence[Ids]) -> Float[Tensor, "d_model d_model"]:
    """Mean outer product of gradients of unit length at all tokens of the texts."""
    objective = TargetNLL(target_ids=target)
    gradients = torch.cat([residual_gradient(engine, objective, layer, text) for text in texts])
    gradients = normalize(gradients[gradients.isfinite().all(-1)], dim=-1)
    return gradients.T @ gradients / max(1, len(gradients))
