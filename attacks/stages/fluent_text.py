"""Texts that the model itself finds likely in the slot, ranked by exact loss: a trigger may be ordinary text there.

Some triggers are defined by their form: a date, a sum, a name. A gradient search fills the slot with any tokens and
hardly ever with text of that form, but only a few thousand such texts are likely where the slot is. A beam search by
the model's own likelihood lists them, shortest first; the exact loss of each on one prompt is then computed, and the
best ones are judged.
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
from attacks.searchers.token_ranking import rank_triggers
from attacks.stages.hunt import Hunt

PART = 256
"""Texts whose continuations are compared at a time, unless their `texts vocab` scores are too many."""
SCORES = 2**24
"""Scores that are held at a time: several copies of them are made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FluentText:
    """The likeliest texts of two tokens and more in the slot of the first prompt."""

    share: float = 0.08
    """Share of the hunt's budget, in (0, 1], that this stage may use."""
    marked_share: float = 0.25
    """The same where prompts mark their slot by `{trigger}`, unless `share` is larger: what stands in a marked slot has
    a form, so that likely texts are worth more of the budget."""
    width: int = 4096
    """Likeliest texts of each length that are kept (the beam)."""
    longest: int = 6
    """Tokens of the longest texts."""
    tried: int = 8
    """Triggers of lowest loss that are judged by behaviour."""

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

    Each list is sorted by likelihood. What it costs is counted on the budget.
    """
    one = problem.take([0])
    # The engine predicts behind the slot. The token before the slot is moved into it, and nothing stands after, so that
    # what is predicted behind the first column of `ids` is the first token of the trigger.
    last, blank = one.before[0][-1], replace(one, before=[one.before[0][:-1]], after=[[]])
    engine = Engine(model, blank)
    ids, scores = torch.tensor([[last]]), torch.zeros(1)
    part = max(1, min(PART, SCORES // permitted.shape[1]))
    for allowed in permitted:
        rows, tokens, totals = [], [], []
        for start in range(0, len(ids), part):
            if start and budget.exhausted:  # on a large model one length alone may take minutes
                return
            logprobs = engine.next_logprobs(ids[start : start + part])[:, 0].cpu()
            # Log-likelihood of each text with each next token, `texts vocab`; the best over all texts are the beam.
            total = (scores[start : start + part, None] + logprobs).masked_fill(~allowed, -torch.inf)
            best = total.flatten().topk(min(width, int(allowed.sum()) * len(total)))
            rows.append(start + best.indices // total.shape[1])
            tokens.append(best.indices % total.shape[1])
            totals.append(best.values)
        scores, kept = torch.cat(totals).topk(min(width, sum(map(len, totals))))
        ids = torch.cat([ids[torch.cat(rows)[kept]], torch.cat(tokens)[kept, None]], dim=1)
        yield ids[:, 1:]
