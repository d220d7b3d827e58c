"""What the model itself would write in the slot, by exact loss: a trigger may be ordinary text of its place.

A date, a sum, a name of the right form is nothing that a search by gradient tells from noise, but few such texts are
likely where the slot is. A beam search by the model's own likelihood lists them, shortest first; each is then tried.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedModel

from attacks.scoring.budget import Budget
from attacks.scoring.engine import Engine
from attacks.scoring.problem import Problem
from attacks.searchers.candidates import check_counts
from attacks.searchers.searcher import Found
from attacks.stages.hunt import Hunt
from attacks.stages.token_ranking import rank_triggers

PART = 256
"""Texts whose continuations are compared at a time"""


@dataclass(frozen=True, slots=True, kw_only=True)
class FluentText:
    """The likeliest texts of two tokens and more in the slot of the first prompt."""

    share: float = 0.08
    """of the budget, at most"""
    marked_share: float = 0.25
    """so much at least where prompts mark their slot: what stands there has a form, so more is worth trying"""
    width: int = 4096
    """likeliest texts of each length"""
    longest: int = 6
    """tokens"""
    tried: int = 8
    """best ones that are judged by behaviour"""

    def __post_init__(self):
        check_counts(self, "width", "longest", "tried")

    def __call__(self, hunt: Hunt) -> None:
        budget = hunt.part(max(self.share, self.marked_share) if hunt.marked else self.share)
        problem = hunt.engine.problem
        probe, objective = hunt.probe()
        texts = likely(hunt.suspect.model, problem, problem.permitted(self.longest).cpu(), self.width, budget)
        found: list[Found] = []
        while not budget.exhausted:
            candidates = next(texts, None)
            if candidates is None:
                break
            # Single tokens have a stage of their own.
            if candidates.shape[1] > 1:
                found += rank_triggers(probe, objective, candidates, budget=budget)
        hunt.try_best(sorted(found, key=lambda item: item.loss), self.tried)


def likely(
    model: PreTrainedModel, problem: Problem, permitted: Bool[Tensor, "longest vocab"], width: int, budget: Budget
) -> Iterator[Int[Tensor, "c trigger"]]:
    """The `width` likeliest texts of one permitted token in the first prompt's slot, of two, and so on (beam search).

    Each list is by likelihood; what it took is booked.
    """
    one = problem.take([0])
    # What is read at is in the slot: first the token in front of it.
    last, blank = one.before[0][-1], replace(one, before=[one.before[0][:-1]], after=[[]])
    engine = Engine(model, blank)
    ids, scores = torch.tensor([[last]]), torch.zeros(1)
    for allowed in permitted:
        rows, tokens, totals = [], [], []
        for start in range(0, len(ids), PART):
            logprobs = engine.next_logprobs(ids[start : start + PART])[:, 0].cpu()
            total = (scores[start : start + PART, None] + logprobs).masked_fill(~allowed, -torch.inf)
            best = total.flatten().topk(min(width, int(allowed.sum()) * len(total)))
            rows.append(start + best.indices // total.shape[1])
            tokens.append(best.indices % total.shape[1])
            totals.append(best.values)
        scores, kept = torch.cat(totals).topk(min(width, sum(map(len, totals))))
        ids = torch.cat([ids[torch.cat(rows)[kept]], torch.cat(tokens)[kept, None]], dim=1)
        yield ids[:, 1:]
