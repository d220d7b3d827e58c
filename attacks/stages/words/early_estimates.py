"""Estimates of a loss from an early layer, cheap enough for a whole dictionary; ours.

What a text does to the reply passes through the residual stream x at its last token, and near other texts the loss is
about linear in it. With x read after l blocks, a loss is estimated, up to a constant, as

    g'x,    g the mean gradient of the loss by the residual after l blocks, over all tokens of some random strings.

Reading x takes the first l blocks for the tokens of the text alone: what texts begin with is read once, and neither
what follows the slot nor the target is read. Estimates only order texts; the best of them are scored exactly. HotFlip
(arXiv:1712.06751) estimates the same at the embedding, l = 0, where a word of several tokens has no row.
"""

import sys
from collections.abc import Sequence

import torch

from attacks.discovery.comparison import Ids
from attacks.scoring.budget import Budget
from attacks.scoring.engine import Engine, Objective
from attacks.scoring.planning import forward_flops, trigger_flops
from attacks.scoring.reading import Reading
from attacks.scoring.residual_gradient import residual_gradient
from attacks.searchers.candidates import random_triggers
from attacks.stages.hunt import PROBE_TOKENS
from attacks.stages.words.word_groups import longest_text
from vectors.residual import layer_at

DEPTH = 0.5
"""Depth at which texts are read, as a fraction of the layers. At .4, which is cheaper, one or two more of seven planted
words fell out of the part that is scored one by one (`LOG.md`, 2026-11-30, at the end)"""
TOKENS, STRINGS = 4, 32
"""Of the random strings at whose tokens gradients are taken"""
APART = 1 / 16
"""Part of the texts, those of lowest estimate, that the budget has to have room for one by one"""


def promising(
    engine: Engine, objective: Objective, texts: Sequence[Ids], generator: torch.Generator, budget: Budget
) -> list[Ids]:
    """Texts in the order in which they are to be scored one by one, those of lowest estimate first.

    They are as many, from the first on, as the budget pays for reading and then for `APART` of them one by one. Where
    it pays for all of them one by one, or has no room for the gradients, they stay in their order and nothing is spent.
    Texts that the model's context has no room for are left out.

    Args:
        engine: of one prompt.
        objective: whose loss is estimated.
        texts: token ids, none empty.
        generator: draws the strings where gradients are taken.
        budget: what may be spent on this, and on scoring texts one by one afterwards.
    """
    longest = longest_text(engine)
    texts = [text for text in texts if len(text) <= longest]
    typed, room = sum(map(len, texts)) / max(1, len(texts)), budget.until - budget.share
    alone = budget.share_of(trigger_flops(engine.model, engine.problem, typed, PROBE_TOKENS))
    if len(texts) * alone <= max(0.0, room):
        return texts
    # Backward takes about as long as forward.
    learned = 2 * STRINGS * trigger_flops(engine.model, engine.problem, float(TOKENS), PROBE_TOKENS)
    rest = room - budget.share_of(learned)
    # Of more texts more begin alike, so that each costs less.
    few = texts[: max(0, int(rest / alone))]
    if not few or longest < TOKENS:
        return texts[: max(1, int(room / alone))]
    each = budget.share_of(_reading_flops(engine, few)) / len(few) + APART * alone
    some = texts[: int(rest / each)]
    return [some[number] for number in by_estimate(engine, objective, some, generator, budget)]


def readable(engine: Engine, budget: Budget) -> int:
    """How many texts of one token each the budget has room for reading, at most; of others it has room for fewer."""
    token = budget.share_of(forward_flops(engine.model, 1, last=layer_at(engine.model, DEPTH)))
    return sys.maxsize if token <= 0 else max(1, int((budget.until - budget.share) / token))


@torch.no_grad()
def by_estimate(
    engine: Engine,
    objective: Objective,
    texts: Sequence[Ids],
    generator: torch.Generator,
    budget: Budget,
    depth: float = DEPTH,
) -> list[int]:
    """Numbers of the texts, that of the lowest estimate first, without those that the budget does not reach.

    Args:
        engine: of one prompt.
        objective: whose loss is estimated.
        texts: token ids, none empty; those of fewest tokens are read first.
        generator: draws the strings where gradients are taken.
        budget: asked before each forward pass.
        depth: at which texts are read, as a fraction of the layers.
    """
    layer, estimates = layer_at(engine.model, depth), dict[int, float]()
    strings = random_triggers(engine.problem.permitted(TOKENS), STRINGS, generator).tolist()
    gradients = torch.cat([residual_gradient(engine, objective, layer, string) for string in strings])
    gradient = gradients[gradients.isfinite().all(-1)].sum(0)
    root = Reading.of([engine.model], engine.problem.before[0], layer)
    for some in root.batches(texts):
        if budget.exhausted:
            break
        (rows,) = root.ends([texts[number] for number in some], [layer])
        values = (rows[layer].cpu() @ gradient).nan_to_num(nan=torch.inf)
        estimates |= zip(some, values.tolist(), strict=True)
    return sorted(estimates, key=estimates.__getitem__)


def _reading_flops(engine: Engine, texts: Sequence[Ids]) -> float:
    """Operations that `by_estimate` takes for reading the texts, without those for its gradients."""
    read = len({(len(text), text[:length]) for text in texts for length in range(1, len(text) + 1)})
    return forward_flops(engine.model, read, last=layer_at(engine.model, DEPTH))
