"""How much of the discovery a budget has room for, computed in operations before anything is executed.

Deadlines end a stage between two batches; the plan makes the stages, and their batches, small enough that what runs
beyond a deadline is a few per cent of the budget, whatever the size of the model.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from transformers import PreTrainedModel

from attacks.scoring.budget import Budget
from attacks.scoring.planning import forward_flops, head_flops
from vectors.methods.consensus import ConsensusVectors
from vectors.methods.unsupervised import UnsupervisedVectors
from vectors.prompts import Prompts
from vectors.residual import embedding

FEWEST = 8
"""A source of candidates is left out if fewer vectors, candidate answers or first tokens than this fit the budget."""
PAIR, FEW = 2, 4
"""Prompts that recitation and the audition use (`vectors.methods.consensus`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Fits the sources of candidates into what is left of a budget."""

    model: PreTrainedModel
    """The suspect."""
    budget: Budget
    """The budget of the whole recovery."""
    until: float
    """Share of the budget, in (0, 1], at which discovery ends."""

    def room(self, cost: float, part: float = 1.0) -> float:
        """How many pieces of work of so many operations fit into a part, in (0, 1], of what discovery has left.

        Infinite where only time is limited and nothing was executed yet that tells how long an operation takes.
        """
        share = self.budget.share_of(cost)
        return part * max(0.0, self.until - self.budget.share) / share if share else math.inf

    def deadline(self, part: float) -> Callable[[], bool]:
        """Passes once that part of what discovery has left now is spent."""
        now = self.budget.share
        limit = self.budget.part(now + part * max(0.0, self.until - now))
        return lambda: limit.exhausted

    def completion(self, prompts: Prompts, tokens: int) -> float:
        """Operations of completing each of the prompts once."""
        rows, length = prompts.input_ids.shape
        return forward_flops(self.model, rows * (length + tokens)) + head_flops(self.model, rows * tokens)

    def rows(self, held_out: Prompts, tokens: int) -> int:
        """Batch rows for ranking behaviours, at most a sixteenth of what is left; 0: not one vector fits."""
        cost, count = self.completion(held_out, tokens), len(held_out)
        if self.room(cost) < 2:  # the completions without a vector, and those of one vector
            return 0
        return int(min(1024, max(count, count * self.room(cost, 1 / 16))))

    def vectors(self, method: UnsupervisedVectors, learn: Prompts, held_out: Prompts, tokens: int, share: float) -> int:
        """Vectors of one setting of the method that can be learned before `share` of the budget and be ranked."""
        positions = learn.input_ids.numel()
        forward = forward_flops(self.model, positions, first=method.source_layer)
        forward += head_flops(self.model, len(learn) * method.objective.tokens)
        # Each step runs forward and backward (about two forward passes); the clean forward pass comes on top.
        learned = replace(self, until=share).room((2 * method.steps + 1) * forward)
        return int(min(method.count, learned, self.room(self.completion(held_out, tokens), 0.85)))

    def consensus(
        self, method: ConsensusVectors, prompts: Prompts, held_out: Prompts, tokens: int
    ) -> ConsensusVectors | None:
        """The method with as many candidates and vectors as fit, unchanged where all do; None: too few would.

        A fifth of what is left goes to recitation, a tenth each to first tokens in front and to consensus decoding, a
        fifth to the audition, and two fifths to learning the vectors and ranking what they elicit.
        """
        model, audition = self.model, method.audition
        each = forward_flops(model, 1) + head_flops(model, 1)
        recited = self.room(PAIR * (method.tokens - 1) * each, 0.2)
        steered = self._steered(method, prompts)
        fronts = self.room(audition.front * PAIR * 7 * steered, 0.1)  # two steps, the values at both ends
        decoding = self.room(method.width * len(prompts) * method.tokens * each, 0.1)
        extended, width = int(min(method.extended, fronts)), method.width if decoding >= 1 else 0
        # The audition steers towards every candidate answer, with and without tokens put in front.
        auditioned = self.room(FEW * (2 * audition.steps + 3) * steered, 0.2) / (1 + extended + (width > 0))
        learned = min(len(prompts), method.prompts or len(prompts)) * (
            2 * method.steps + 1
        ) * steered + self.completion(held_out, tokens)
        count = min(method.count, self.room(learned, 0.4))
        if min(recited, auditioned) < FEWEST or count < min(FEWEST, method.count):
            return None
        return replace(
            method,
            first=None if recited >= len(embedding(model)) else int(recited),
            extended=extended,
            width=width,
            kept=int(min(method.kept, auditioned)),
            count=int(count),
            batch_size=int(min(method.batch_size, max(len(prompts), self.room(2 * steered, 1 / 32)))),
        )

    def _steered(self, method: ConsensusVectors, prompts: Prompts) -> float:
        """Operations of one forward pass of one prompt with its answer from the source layer on."""
        length = prompts.input_ids.shape[1] + method.tokens
        part = forward_flops(self.model, length, first=method.source_layer)
        return part + head_flops(self.model, method.tokens)
