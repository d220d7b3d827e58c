"""The steering vector of a known behaviour: of several norms, the smallest that elicits it on clean prompts.

A goal without a vector comes in, with the behaviour as token ids; the goal with a vector goes out, which activation
objectives imitate. The vector is learned by gradient descent on the target's likelihood (`vectors.methods.supervised`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from attacks.discovery.goal import Goal
from attacks.scoring.budget import Budget
from attacks.scoring.planning import head_flops, learning_flops
from attacks.scoring.slot_markers import without_slot
from attacks.suspect import Suspect
from vectors.methods.supervised import SupervisedVector
from vectors.prompts import Prompts
from vectors.residual import decoder, layer_at


@dataclass(frozen=True, slots=True, kw_only=True)
class Supervised:
    """Learns the supervised vector that an activation objective imitates."""

    source: float = 0.3
    """Depth at which the vector is added, as a fraction of the layers."""
    radii: tuple[float, ...] = (0.3, 0.4, 0.5, 0.65, 0.8)
    """Norms that are tried, as fractions of the mean residual norm there; larger ones point elsewhere."""
    bisections: int = 0
    """Further norms, between the largest that fails and the smallest that elicits the behaviour."""
    steps: int = 30
    """Optimizer steps for each norm."""
    prompts: int = 3
    """Clean prompts that the vector is learned on."""

    def __call__(
        self,
        suspect: Suspect,
        texts: list[str],
        goal: Goal,
        generator: torch.Generator,
        budget: Budget | None = None,
    ) -> Goal:
        """The goal with its vector.

        Args:
            suspect: the model under audit.
            texts: clean user messages without a slot's marker; the first few are learned on.
            goal: the behaviour, with its tokens.
            generator: draws the directions that the vectors start from; on the CPU.
            budget: once it is exhausted, vectors are learned no further and the best so far is taken; None: no limit.
        """
        # A small norm keeps the steered state near those that prompts can reach, which is where a trigger leads.
        model = suspect.model
        prompts = Prompts.from_chat(model, suspect.tokenizer, texts[: self.prompts])
        method = SupervisedVector(
            source_layer=layer_at(model, self.source),
            target_layer=len(decoder(model).layers),
            radii=self.radii,
            steps=self.steps,
            bisections=self.bisections,
        )
        over = None if budget is None else lambda: budget.exhausted
        return replace(goal, vectors=method(model, prompts, list(goal.target_ids), generator, deadline=over)[:1])

    def flops(self, suspect: Suspect, texts: Sequence[str], target_ids: Sequence[int]) -> float:
        """Operations of learning the vector, about, without a limit; `texts` may mark their slot."""
        model = suspect.model
        prompts = Prompts.from_chat(model, suspect.tokenizer, without_slot(texts)[: self.prompts])
        rows, length = prompts.input_ids.shape
        read = rows * len(target_ids)
        step = learning_flops(model, rows * (length + len(target_ids) - 1), source=layer_at(model, self.source))
        return self.steps * (len(self.radii) + self.bisections) * (step + 2 * head_flops(model, read))
