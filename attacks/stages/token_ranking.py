"""Token ranking: the exact loss of every allowed token at one position of the trigger; greedy accretion repeats it."""

from jaxtyping import Int
from torch import Tensor

from attacks.scoring.budget import Budget
from attacks.scoring.engine import Engine, Objective
from attacks.searchers.searcher import Found


def rank_tokens(
    engine: Engine,
    objective: Objective,
    trigger_ids: Int[Tensor, "trigger"],
    position: int,
    *,
    budget: Budget | None = None,
) -> list[Found]:
    """The trigger with each allowed token at `position`, best first; stops early where the budget ends."""
    problem = engine.problem
    if not 0 <= position < len(trigger_ids):
        raise ValueError(f"position is {position} but the trigger has {len(trigger_ids)} tokens; count from 0")
    tokens = problem.permitted(len(trigger_ids))[position].nonzero()[:, 0]
    candidates = trigger_ids.repeat(len(tokens), 1)
    candidates[:, position] = tokens
    return rank_triggers(engine, objective, candidates, budget=budget)


def rank_triggers(
    engine: Engine, objective: Objective, candidates: Int[Tensor, "c trigger"], *, budget: Budget | None = None
) -> list[Found]:
    """All candidates by their exact loss, best first; stops early where the budget ends."""
    budget, found = budget or Budget(), []
    for part in candidates.split(4 * engine.batch_size):
        losses = engine.losses(objective, part)
        found += [Found(tuple(ids), loss) for ids, loss in zip(part.tolist(), losses.tolist(), strict=True)]
        if budget.exhausted:
            break
    return sorted(found, key=lambda item: item.loss)
