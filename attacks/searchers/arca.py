"""ARCA (Jones, Dragan, Raghunathan, Steinhardt 2023, arXiv:2303.04381, algorithm 1), for a fixed output.

Coordinate ascent: each position in turn gets the best of the tokens that a linear approximation shortlists. The
approximation is averaged over random tokens at that position, which sees more of the loss than the gradient at the
present token does. Departures: only the trigger is searched, so the term that the paper computes exactly (for output
tokens) drops out; of the shortlist, the best that re-tokenises is taken; restarts run side by side.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attacks.scoring.budget import Budget
from attacks.scoring.engine import Engine, Objective
from attacks.scoring.problem import Problem
from attacks.searchers.candidates import check_counts, permitted_in_slot, random_triggers
from attacks.searchers.search_log import SearchLog
from attacks.searchers.searcher import Found, OnBest


@dataclass(frozen=True, slots=True, kw_only=True)
class ARCA:
    """Replaces one position after the other by the best of the tokens that look best on average."""

    iterations: int = 50
    """Passes over all positions."""
    averaged: int = 32
    """Random tokens that the linear approximation is averaged over (k in the paper)."""
    topk: int = 32
    """Tokens of the shortlist, whose losses are computed exactly (also k in the paper)."""
    restarts: int = 1
    """Triggers searched side by side."""

    def __post_init__(self):
        check_counts(self, "iterations", "averaged", "topk", "restarts")

    def __call__(
        self,
        engine: Engine,
        objective: Objective,
        generator: torch.Generator,
        budget: Budget | None = None,
        on_best: OnBest | None = None,
    ) -> list[Found]:
        """Successive bests over all restarts, best first; an interrupt keeps what was found.

        Raises:
            ValueError: a longer shortlist than there are allowed tokens, or an empty slot.
        """
        problem, length = engine.problem, engine.problem.trigger_length
        permitted = permitted_in_slot(problem)
        allowed = int(permitted.any(0).sum())
        if self.topk > allowed:
            raise ValueError(f"topk is {self.topk} but only {allowed} tokens are allowed; lower topk")
        with SearchLog(engine, budget, on_best) as log:
            ids = random_triggers(permitted, self.restarts, generator)
            for step in range(self.iterations * length):
                position = step % length
                # Averaged first-order fall of the loss for every token at this position: `restarts vocab`.
                promise = self._promise(engine, objective, ids, position, permitted, generator)
                count = min(self.topk, int(permitted[position].sum()))
                shortlist = promise.topk(count, dim=-1).indices
                # The linear approximation only draws up the shortlist: `restarts count trigger` are scored exactly.
                candidates = with_tokens(ids, position, shortlist)
                losses = log.score(objective, candidates.flatten(0, 1)).view(self.restarts, count)
                # The old token stays only if it is on the shortlist: a step may raise the loss, as in the paper.
                ids = torch.stack([_best(problem, *pair) for pair in zip(candidates, losses, strict=True)])
                if log.over:
                    break
        return log.found

    def _promise(
        self,
        engine: Engine,
        objective: Objective,
        ids: Int[Tensor, "c trigger"],
        position: int,
        permitted: Bool[Tensor, "trigger vocab"],
        generator: torch.Generator,
    ) -> Float[Tensor, "c vocab"]:
        """First-order fall of the loss for each token at `position`, averaged; -inf where not permitted."""
        # The gradient at the present token is accurate for tokens of similar embedding only. Averaged over tokens drawn
        # at random, it says more about tokens far from the present one.
        weights = permitted[position].float().expand(len(ids), -1)
        tokens = torch.multinomial(weights, self.averaged, replacement=True, generator=generator)
        # One gradient per trigger and random token, `c * averaged trigger vocab`; its mean ranks the vocabulary.
        _, gradient = engine.gradient(objective, with_tokens(ids, position, tokens).flatten(0, 1))
        slope = gradient[:, position].float().view(len(ids), self.averaged, -1).mean(1).cpu()
        return (-slope).masked_fill(~permitted[position], -torch.inf)


def with_tokens(ids: Int[Tensor, "c trigger"], position: int, tokens: Int[Tensor, "c k"]) -> Int[Tensor, "c k trigger"]:
    """Each trigger once per token that is to stand at `position`."""
    changed = ids[:, None].repeat(1, tokens.shape[1], 1)
    changed[:, :, position] = tokens
    return changed


def _best(problem: Problem, candidates: Int[Tensor, "k trigger"], losses: Float[Tensor, "k"]) -> Int[Tensor, "trigger"]:
    """The trigger of lowest loss that re-tokenises; the lowest of all where none does, so that the search goes on."""
    order = losses.argsort(stable=True).tolist()
    return candidates[next((i for i in order if problem.retokenizes(candidates[i].tolist())), order[0])]
