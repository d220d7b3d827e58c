"""BEAST: beam search-based adversarial attack (Sadasivan, Saha, Sriramanan et al. 2024, arXiv:2402.15570, algorithm 1).

A beam grows token by token with what the model itself would say at the slot, so the triggers read well and no gradient
is taken. A trigger that the model finds unlikely there is out of reach: random ones are, by construction.

Departures: the paper attacks one prompt; here losses are over all prompts, and the next-token distribution is that of
the *first* prompt up to the slot (another prompt would do as well, an average of several would cost their forward
passes). Only permitted tokens are drawn. A beam prefers triggers that re-tokenise. When the slot is full the search
begins anew until its steps are used, since each run draws other tokens.

Triggers of every length up to the slot's are offered: they are scored in any case, a shorter one with a lower loss is
the better trigger, and a budget that ends while the beam grows leaves something.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attacks.scoring.budget import Budget
from attacks.scoring.engine import Engine, Objective
from attacks.searchers.candidates import check_counts, fittest, permitted_in_slot
from attacks.searchers.search_log import SearchLog
from attacks.searchers.searcher import Found, OnBest
from vectors.residual import read, unembed


@dataclass(frozen=True, slots=True, kw_only=True)
class BEAST:
    """Appends tokens drawn from the model's own next-token distribution and keeps the beams of lowest loss."""

    steps: int = 250
    """Steps in all; each appends one token to every beam."""
    k1: int = 15
    """Triggers kept from one step to the next, and tokens drawn for the first position."""
    k2: int = 15
    """Tokens drawn per kept trigger at the other positions."""

    def __post_init__(self):
        check_counts(self, "steps", "k1", "k2")

    def __call__(
        self,
        engine: Engine,
        objective: Objective,
        generator: torch.Generator,
        budget: Budget | None = None,
        on_best: OnBest | None = None,
    ) -> list[Found]:
        """Every improvement that re-tokenises, of any length up to the slot's; best first. An interrupt keeps them.

        Raises:
            ValueError: an empty slot, or more tokens wanted than are permitted.
        """
        problem = engine.problem
        length = problem.trigger_length
        permitted = permitted_in_slot(problem)
        for name, count, row in (("k1", self.k1, permitted[0]), ("k2", self.k2, permitted[-1])):
            if count > row.sum():
                raise ValueError(f"{name} is {count} but only {int(row.sum())} tokens are allowed; lower {name}")
        with SearchLog(engine, budget, on_best) as log:
            beams = torch.empty(1, 0, dtype=torch.long)
            for _ in range(self.steps):
                if log.over:
                    break
                # A full slot: begin anew from the empty trigger.
                if beams.shape[1] == length:
                    beams = beams[:1, :0]
                place = beams.shape[1]
                count = self.k2 if place else self.k1
                # Draws from the model's own next-token distribution; no gradient is taken.
                tokens = sample_tokens(next_token_logits(engine, beams), permitted[place], count, generator)
                candidates = torch.cat([beams.repeat_interleave(count, 0), tokens.view(-1, 1)], dim=1)
                # `beams * count` triggers, one token longer; the k1 of lowest loss on all prompts go on.
                losses = log.score(objective, candidates)
                beams, _ = fittest(problem, candidates, losses, self.k1)
        return log.found


@torch.no_grad()
def next_token_logits(engine: Engine, beams: Int[Tensor, "c trigger"]) -> Float[Tensor, "c vocab"]:
    """What the model says after the first prompt up to the slot and the tokens so far."""
    model, layers = engine.model, engine.layers
    # The prompt ends at the slot here: `c before + trigger`, whose last hidden state predicts the next trigger token.
    head = torch.tensor(engine.problem.before[0]).expand(len(beams), -1)
    ids = torch.cat([head, beams], dim=1).to(engine.device)
    mask = torch.ones_like(ids)
    hidden = read(model, input_ids=ids, attention_mask=mask, layers=[layers], position=slice(-1, None))[layers]
    return unembed(model, hidden[:, -1])


def sample_tokens(
    logits: Float[Tensor, "c vocab"], permitted: Bool[Tensor, "vocab"], count: int, generator: torch.Generator
) -> Int[Tensor, "c count"]:
    """Permitted tokens drawn from the softmax without replacement.

    The largest of logits plus Gumbel noise are such a draw, and it needs no probabilities, which may underflow.
    """
    # Minus the logarithm of an exponential variable is Gumbel noise.
    noise = torch.empty(logits.shape, dtype=torch.float64).exponential_(generator=generator).log()
    return (logits.cpu() - noise).masked_fill(~permitted, -torch.inf).topk(count, dim=-1).indices
