"""A trained probe as an objective: logistic regression that tells steered states from reachable ones; ours.

A vector can take the residual stream where no prompt does: parts of its effect are then out of reach of any trigger.
The probe looks for the part of the vector's effect that random triggers do not bring about, and the search then raises
the probability of "steered". It is trained on effects `states n d_model`: those of random triggers (reachable), and
those of the same triggers under the vector (steered).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import softplus

from attacks.discovery.goal import Goal
from attacks.objectives.effects import check_vectors, empty_slot, layer_before_last, vectors_of
from attacks.scoring.engine import Engine
from attacks.searchers.candidates import permitted_in_slot, random_triggers
from vectors.steering import SteeringVectors


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Negative log-probability, in nats, that a logistic regression gives "steered" against "reachable"."""

    weight: Float[Tensor, "d_model"]
    """Log-odds of "steered" per unit of the effect."""
    bias: float
    """Log-odds of "steered" where there is no effect."""
    clean: Float[Tensor, "n d_model"]
    """Residual at the last token of each prompt with an empty slot."""
    layer: int
    """Layer whose residual the probe reads."""

    @classmethod
    def from_vectors(
        cls,
        engine: Engine,
        vectors: SteeringVectors,
        layer: int,
        generator: torch.Generator,
        *,
        draws: int = 32,
        penalty: float = 0.01,
    ) -> "Probe":
        """Learns to tell steered states from states that prompts alone can reach.

        Reachable are the engine's prompts with random permitted triggers and with an empty slot. Steered are the very
        same inputs under each vector, so that nothing but the vectors tells the classes apart: neither a
        prompt, nor whether the slot is filled. Prompts are few; triggers give both classes their variety. The classes
        weigh the same, however many vectors there are.

        Args:
            engine: holds the prompts and the length of the random triggers.
            vectors: k of them; "steered" means by any of them, so give those of one behaviour.
            layer: where the probe reads, from the vectors' own on.
            generator: draws the triggers.
            draws: how many random triggers.
            penalty: half of it times the squared norm of the weights is added to the loss, at effects of mean square 1.

        Raises:
            ValueError: no draws, a penalty that is not positive, no slot, or as for
                `SteeredKL.from_vectors`.
        """
        check_vectors(engine, vectors, [layer])
        if draws < 1 or penalty <= 0:
            raise ValueError(f"draws is {draws}, penalty is {penalty}; give at least 1 draw and a positive penalty")
        # The same triggers serve both classes: what they do themselves cannot tell the classes apart.
        triggers = random_triggers(permitted_in_slot(engine.problem), draws, generator)
        clean = empty_slot(engine, [layer])[layer].float()
        reachable, steered = [clean[None], _states(engine, triggers, layer)], []
        for vector in vectors:
            with vector.apply(engine.model):
                # An engine of its own: the cached prefix of the other one is that of the unsteered model.
                own = Engine(engine.model, engine.problem, engine.batch_size)
                steered += [empty_slot(engine, [layer])[layer].float()[None], _states(own, triggers, layer)]
        # Only changes against the empty slot are compared, so that prompts cancel: `states n d_model`, then flat rows.
        positive, negative = ((torch.cat(states) - clean).flatten(0, 1) for states in (steered, reachable))
        weight, bias = _logistic(positive, negative, penalty)
        return cls(weight=weight, bias=bias, clean=clean, layer=layer)

    @classmethod
    def from_goal(cls, engine: Engine, goal: Goal) -> "Probe":
        """Learns the goal's first vector at the layer before the last; its random triggers are always the same."""
        vectors = vectors_of(goal)
        generator = torch.Generator().manual_seed(0)
        return cls.from_vectors(engine, vectors[:1], layer_before_last(engine), generator)

    def __call__(self, engine: Engine, candidates: Tensor) -> Float[Tensor, "c"]:
        effect = engine.residuals(candidates, [self.layer])[self.layer].float() - self.clean
        return softplus(-(effect @ self.weight + self.bias)).mean(1)


@torch.no_grad()
def _states(engine: Engine, triggers: Int[Tensor, "c trigger"], layer: int) -> Float[Tensor, "c n d_model"]:
    """Residuals with each trigger in the slot."""
    parts = triggers.to(engine.device).split(engine.batch_size)
    return torch.cat([engine.residuals(part, [layer])[layer].float() for part in parts])


def _logistic(
    positive: Float[Tensor, "p d_model"], negative: Float[Tensor, "q d_model"], penalty: float
) -> tuple[Float[Tensor, "d_model"], float]:
    """(weights, bias) of a regularised logistic regression with classes of equal weight."""
    high, low = positive.cpu().double(), negative.cpu().double()
    # At effects of mean square 1 the penalty means the same for every model and layer.
    size = torch.cat([high, low]).square().sum(-1).mean().sqrt()
    high, low = high / size, low / size
    weight = torch.zeros_like(high[0], requires_grad=True)
    bias = torch.zeros_like(size, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        with torch.enable_grad():
            # softplus(-z) is the negative log-probability of a class with log-odds z; each class has its own mean.
            errors = softplus(-(high @ weight + bias)).mean() + softplus(low @ weight + bias).mean()
            total = errors / 2 + penalty / 2 * weight.square().sum()
            total.backward()
        return total

    optimizer.step(loss)
    return (weight / size).detach().to(positive), float(bias.detach())
