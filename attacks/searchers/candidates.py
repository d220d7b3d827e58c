"""What searchers share: which tokens the slot permits, random triggers, shortlists by gradient, and beams.

A trigger re-tokenises if its text, typed into a prompt, is encoded to the very same ids. Only such triggers are finds;
`fittest` prefers them wherever a beam is chosen.
"""

from itertools import islice

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attacks.scoring.problem import Problem

LOOK = 64
"""Triggers that `fittest` looks at, beyond those wanted, for some that re-tokenise."""


def check_counts(settings: object, *names: str) -> None:
    """Raises ValueError for a setting below 1."""
    for name in names:
        if getattr(settings, name) < 1:
            raise ValueError(f"{name} is {getattr(settings, name)}; it must be at least 1")


def permitted_in_slot(problem: Problem) -> Bool[Tensor, "trigger vocab"]:
    """Tokens that may stand at each position of the slot, on the CPU; raises ValueError for a slot of no tokens."""
    if problem.trigger_length == 0:
        raise ValueError("trigger_length is 0; give a slot of at least 1 token")
    return problem.permitted(problem.trigger_length).cpu()


def random_triggers(
    permitted: Bool[Tensor, "trigger vocab"], count: int, generator: torch.Generator
) -> Int[Tensor, "count trigger"]:
    """Uniform over the tokens permitted at each position."""
    draws = [torch.multinomial(row.float(), count, replacement=True, generator=generator) for row in permitted]
    return torch.stack(draws, dim=1)


def most_promising(
    gradient: Float[Tensor, "c vocab"], permitted: Bool[Tensor, "vocab"], count: int
) -> Int[Tensor, "c topk"]:
    """Shortlists: the `count` permitted tokens (or all) of lowest first-order loss, by the gradient (HotFlip)."""
    # To first order, putting token v where token u stood changes the loss by gradient[v] - gradient[u]; the second term
    # is the same for all v.
    masked = gradient.float().cpu().masked_fill(~permitted, torch.inf)
    return (-masked).topk(min(count, int(permitted.sum())), dim=-1).indices


def fittest(
    problem: Problem, candidates: Int[Tensor, "c trigger"], losses: Float[Tensor, "c"], count: int
) -> tuple[Int[Tensor, "kept trigger"], float]:
    """(`count` triggers, those that re-tokenise first and by loss within each kind; loss of the first, or infinity).

    Where too few re-tokenise, the others of lowest loss fill up the beam: the next step may make them typable.
    """
    # Stable, so that ties fall alike whatever the batch size. Re-tokenising is slow, so only the best are looked at.
    order = losses.argsort(stable=True).tolist()
    typable = (i for i in order[: count + LOOK] if problem.retokenizes(candidates[i].tolist()))
    kept = list(islice(typable, count))
    best = float(losses[kept[0]]) if kept else torch.inf
    kept += [i for i in order[: 2 * count] if i not in kept][: count - len(kept)]
    return candidates[kept], best
