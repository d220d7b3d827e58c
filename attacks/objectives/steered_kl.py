"""Steered KL: with the trigger, the model should say next what the steered model says without it; ours.

The next-token distributions of the steered model, `n vocab` for n prompts with an empty slot, are the target; those of
c candidates, `c n vocab`, are compared with it by the Kullback-Leibler divergence. No text of the behaviour is needed,
so that this objective works with a vector of unknown effect.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from attacks.discovery.goal import Goal
from attacks.objectives.effects import check_vectors, empty_slot, vectors_of
from attacks.scoring.engine import Engine
from vectors.residual import unembed
from vectors.steering import SteeringVectors


@dataclass(frozen=True, slots=True, kw_only=True)
class SteeredKL:
    """KL(steered || candidate) of the next-token distribution read at `layer`, nats; needs no behaviour text."""

    steered_logprobs: Float[Tensor, "n vocab"]
    """Log-probabilities that the steered model gives to the next token of each prompt with an empty slot."""
    layer: int
    """Blocks before the read-out; the number of layers gives the model's true output."""

    @classmethod
    def from_vectors(cls, engine: Engine, vectors: SteeringVectors, layer: int) -> "SteeredKL":
        """Imitates the next-token distribution under the first of `vectors`.

        Raises:
            ValueError: vectors of another model, a layer before theirs or beyond the model.
        """
        check_vectors(engine, vectors, [layer])
        with vectors[:1].apply(engine.model):
            # The layer may lie before the last: its residual is then read through the final norm and unembedding.
            hidden = empty_slot(engine, [layer])[layer]
        with torch.no_grad():
            return cls(steered_logprobs=unembed(engine.model, hidden).float().log_softmax(-1), layer=layer)

    @classmethod
    def from_goal(cls, engine: Engine, goal: Goal) -> "SteeredKL":
        """Imitates the output under the goal's vector."""
        vectors = vectors_of(goal)
        return cls.from_vectors(engine, vectors, engine.layers)

    def __call__(self, engine: Engine, candidates: Tensor) -> Float[Tensor, "c"]:
        def divergence(logits: Tensor, prompts: Tensor) -> Tensor:
            # KL(p || q) = sum over the vocabulary of p (log p - log q), p being the steered model.
            steered = self.steered_logprobs[prompts]
            return (steered.exp() * (steered - logits.float().log_softmax(-1))).sum(-1)

        return engine.output_scores(candidates, self.layer, divergence).mean(1)
