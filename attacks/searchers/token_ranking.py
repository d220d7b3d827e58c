"""Token ranking: the exact loss of every allowed token at one position of the trigger.

Exact means one forward pass per token, with no gradient to mislead it. Greedy accretion without a shortlist repeats it
position by position; `SingleTokens` applies it to a trigger of one token.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from attacks.scoring.budget import Budget
from attacks.scoring.engine import Engine, Objective
from attacks.scoring.planning import trigger_flops
from attacks.scoring.problem import OutgrowsContext
from attacks.searchers.searcher import Found

STARTS = 32
"""Tokens at which the gradient is taken, and averaged, before a ranking for which the budget may be too small."""
FIRST = 64
"""Candidates that are scored first, to learn what one of them costs; fewer where the budget has no room for them."""


def rank_tokens(
    engine: Engine,
    objective: Objective,
    trigger_ids: Int[Tensor, "trigger"],
    position: int,
    *,
    budget: Budget | None = None,
) -> list[Found]:
    """The trigger with each allowed token at `position`, best first; within a budget the most promising are scored.

    What a token promises is the first-order change of the loss (HotFlip, arXiv:1712.06751), averaged over several
    tokens that stand in its place. It only decides which tokens are left out where the budget is too small for all.
    """
    problem = engine.problem
    if not 0 <= position < len(trigger_ids):
        raise ValueError(f"position is {position} but the trigger has {len(trigger_ids)} tokens; count from 0")
    tokens = problem.permitted(len(trigger_ids))[position].nonzero()[:, 0]
    if budget is not None:
        # Tokens spread evenly over the vocabulary take the position in turn: `STARTS trigger`.
        starts = trigger_ids.repeat(STARTS, 1)
        starts[:, position] = tokens[torch.linspace(0, len(tokens) - 1, STARTS).long()]
        _, gradient = engine.gradient(objective, starts)  # `STARTS trigger vocab`
        tokens = tokens[gradient[:, position].float().mean(0).cpu()[tokens].argsort()]
    candidates = trigger_ids.repeat(len(tokens), 1)
    candidates[:, position] = tokens
    return rank_triggers(engine, objective, candidates, budget=budget)


def rank_triggers(
    engine: Engine, objective: Objective, candidates: Int[Tensor, "c trigger"], *, budget: Budget | None = None
) -> list[Found]:
    """All candidates by their exact loss, best first; those that the budget does not reach are left out.

    A first batch shows what a candidate costs, so that no later one outruns the budget. Of candidates that outgrow the
    context, none is ranked.
    """
    budget, found, largest = budget or Budget(), [], 4 * engine.batch_size
    began, size = budget.share, _affordable(engine, candidates.shape[1], budget)
    least = size
    while len(found) < len(candidates) and not (found and budget.exhausted):
        part = candidates[len(found) : len(found) + size]
        try:
            losses = engine.losses(objective, part)
        except OutgrowsContext:
            break
        found += [Found(tuple(ids), loss) for ids, loss in zip(part.tolist(), losses.tolist(), strict=True)]
        # As many next as the rest of the budget pays for, at the average cost so far.
        each = (budget.share - began) / len(found)
        size = largest if each <= 0 else min(largest, max(least, int((budget.until - budget.share) / each)))
    return sorted(found, key=lambda item: item.loss)


def _affordable(engine: Engine, length: int, budget: Budget) -> int:
    """Candidates of so many tokens that the budget surely has room for, up to `FIRST`, and one at least."""
    each = budget.share_of(trigger_flops(engine.model, engine.problem, float(length)))
    return FIRST if each <= 0 else max(1, min(FIRST, int((budget.until - budget.share) / each)))


def by_length(rows: Iterable[Sequence[int]]) -> list[Int[Tensor, "c length"]]:
    """Triggers as ids, a tensor per number of tokens, the shortest first: an engine scores one length at a time."""
    groups: defaultdict[int, list[Sequence[int]]] = defaultdict(list)
    for row in rows:
        groups[len(row)].append(row)
    return [torch.tensor(groups[length]) for length in sorted(groups) if length]
