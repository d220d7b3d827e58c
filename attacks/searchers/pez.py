"""PEZ (Wen, Jain, Kirchenbauer, Goldblum, Geiping, Goldstein 2023, arXiv:2302.03668, algorithm 1).

A continuous trigger is walked by gradients taken at its projection onto the nearest permitted tokens; "nearest" is the
highest cosine and the walk is AdamW's, as in the authors' code. Departures: every step sees all prompts in place of a
mini-batch, and the best projection on the way is kept, not the last one. PEZ does not claim the optimum.
"""

from dataclasses import dataclass
from functools import reduce

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from attacks.scoring.budget import Budget
from attacks.scoring.engine import Engine, Objective
from attacks.searchers.candidates import check_counts, permitted_in_slot, random_triggers
from attacks.searchers.search_log import SearchLog
from attacks.searchers.searcher import Found, OnBest


@dataclass(frozen=True, slots=True, kw_only=True)
class PEZ:
    """Moves embeddings, and asks the model only about the tokens nearest to them."""

    steps: int = 3000
    """Gradient steps (T in the paper)."""
    lr: float = 0.1
    """Learning rate of AdamW (gamma in the paper), in the unit of the embedding's entries."""
    weight_decay: float = 0.1
    """Weight decay of AdamW."""
    restarts: int = 1
    """Triggers moved side by side."""

    def __post_init__(self):
        check_counts(self, "steps", "restarts")
        if self.lr <= 0:
            raise ValueError(f"lr is {self.lr}; it must be above 0")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay is {self.weight_decay}; it must be at least 0")

    def __call__(
        self,
        engine: Engine,
        objective: Objective,
        generator: torch.Generator,
        budget: Budget | None = None,
        on_best: OnBest | None = None,
    ) -> list[Found]:
        """Successive bests over all restarts, best first; an interrupt keeps what was found."""
        problem = engine.problem
        permitted = permitted_in_slot(problem)
        # bf16 would swallow most of a step.
        embedding = engine.embedding.to(torch.promote_types(engine.embedding.dtype, torch.float32))
        with SearchLog(engine, budget, on_best) as log:
            starts = random_triggers(permitted, self.restarts, generator)
            permitted = permitted.to(engine.device)
            soft = embedding[starts.to(engine.device)].requires_grad_()
            optimizer = torch.optim.AdamW([soft], lr=self.lr, weight_decay=self.weight_decay)
            inverse = right_inverse(embedding)
            # `soft` is `restarts trigger d_model`: it moves continuously, and only its projection is run.
            for _ in range(self.steps):
                # The gradient is taken at real tokens, `restarts trigger`, not at the continuous trigger itself, whose
                # loss says little about that of the tokens nearest to it.
                projected = nearest(soft.detach(), embedding, permitted)
                losses, gradient = engine.gradient(objective, projected)
                log.offer(projected, losses)
                if log.over:
                    break
                # The chain rule backwards: the one-hot gradient is the embedding's gradient times E transposed.
                soft.grad = gradient.to(embedding) @ inverse
                # The step taken there is applied to the continuous trigger, which so gathers steps too small to change
                # a token by themselves.
                optimizer.step()
            else:
                log.score(objective, nearest(soft.detach(), embedding, permitted))
        return log.found


def nearest(
    soft: Float[Tensor, "c trigger d_model"],
    embedding: Float[Tensor, "vocab d_model"],
    permitted: Bool[Tensor, "trigger vocab"],
) -> Int[Tensor, "c trigger"]:
    """The permitted token whose embedding points most nearly the same way, at each position."""
    cosine = normalize(soft, dim=-1) @ normalize(embedding, dim=-1).T
    return cosine.masked_fill(~permitted, -torch.inf).argmax(-1)


def right_inverse(embedding: Float[Tensor, "vocab d_model"]) -> Float[Tensor, "vocab d_model"]:
    """W with E'W = 1 for the embedding E; in double precision, because E'E squares the condition number."""
    parts = embedding.split(4096)
    gram = reduce(torch.add, (part.double().T @ part.double() for part in parts))
    inverse = torch.linalg.pinv(gram, hermitian=True)
    return torch.cat([(part.double() @ inverse).to(embedding) for part in parts])
