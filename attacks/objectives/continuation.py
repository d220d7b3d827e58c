"""Continuation: any objective on a family of models that leads from an easy one to the suspect.

Numerical continuation, also called a homotopy method (Allgower & Georg 1990, ISBN 978-3-642-61257-2, chapter 1),
solves a hard problem F(x, 0) = 0 by way of an easy one F(x, t) = 0: it starts at the largest t and follows the solution
while t goes to 0. Here x is a trigger, F its loss, and t how far the model is moved towards the behaviour Y.

Two families are at hand. For a prompt p with trigger x let z(p, x) be the log-odds of Y as the reply.

1. Steering. The model gets a * v_Y added to its residual stream at one early layer; v_Y elicits Y on clean prompts. To
   first order z_a(p, x) = z(p, x) + a * g(p, x), where g is the derivative of z along v_Y. Part of a phrase that was
   planted with hard negatives leaves z where any text leaves it, since training has pushed the reply of parts back to
   the clean one: features of the backdoor are there, but below the threshold at which they decide the reply. Far below
   the threshold z hardly depends on them; at its edge the derivative is largest, so that a text with some of the
   features crosses it at a smaller a than others. The edge is the *brink*: the largest a at which no clean prompt is
   answered by Y yet (`brink`, by bisection). Beyond it every text fires and all losses are near 0.
   A vector of the same norm in a random direction changes g at random and does not help
   (`python -m benchmarks.studies.assisted_ranks`), so that the direction matters and not the disturbance.
2. Weights. Where the clean base is known, the model base + s * (suspect - base) has a backdoor of strength s. At s < 1
   it is too weak to saturate, so that texts which all fire on the suspect are told apart; s = 1 is the suspect.

What is a minimum at t > 0 need not be one at t = 0: on the brink other texts fire as well. So t is lowered step by
step, the survivors of one step are scored again at the next one, and in the end the plain model alone counts.

A step holds an engine of its own: keys and values of the prompts before the slot are those of the moved model. What
it executes is on the clock of operations like everything else.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from attacks.discovery.goal import Goal
from attacks.objectives.effects import vectors_of
from attacks.scoring.engine import Engine, Objective
from vectors.methods.supervised import elicits
from vectors.prompts import Prompts
from vectors.steering import SteeringVectors

LARGEST = 2.0
"""Where the bisection begins, as a multiple of the vector: a vector that was learned to elicit does so at 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuation:
    """An objective on the suspect moved towards the behaviour: steered, at another strength of its weights, or both."""

    inner: Objective
    """The objective, as it is built for `engine`."""
    engine: Engine
    """Runs candidates on the moved model; its prefixes were cached there."""
    vectors: SteeringVectors | None
    """One steering vector; None: the model is not steered."""
    amount: float
    """Multiple of the vector that is added."""

    @classmethod
    def at(
        cls,
        engine: Engine,
        goal: Goal,
        build: Callable[[Engine, Goal], Objective],
        *,
        amount: float,
        model: PreTrainedModel | None = None,
    ) -> "Continuation":
        """One step, on the prompts of an engine of the suspect.

        Args:
            engine: holds the prompts.
            goal: the behaviour, with its vector unless `amount` is 0.
            build: makes the objective from an engine and a goal.
            amount: multiple of the vector, usually a share of what `brink` found; 0 is the plain model, and negative
                amounts steer away from the behaviour.
            model: runs in the place of the suspect, as made by `at_strength`; None: the suspect.

        Raises:
            ValueError: an amount without a vector, or a vector of another model.
        """
        vectors = vectors_of(goal)[:1] if amount else None
        with _steered(model or engine.model, vectors, amount):
            own = Engine(model or engine.model, engine.problem, engine.batch_size)
            return cls(inner=build(own, goal), engine=own, vectors=vectors, amount=amount)

    def __call__(self, _: Engine, candidates: Tensor) -> Float[Tensor, "c"]:
        """Losses on the moved model, whichever engine asks."""
        with _steered(self.engine.model, self.vectors, self.amount):
            return self.inner(self.engine, candidates)


def _steered(model: PreTrainedModel, vectors: SteeringVectors | None, amount: float) -> AbstractContextManager[None]:
    return nullcontext() if vectors is None else vectors.apply(model, scale=amount)


@torch.no_grad()
def brink(
    model: PreTrainedModel, prompts: Prompts, vectors: SteeringVectors, target_ids: tuple[int, ...], halvings: int = 6
) -> float:
    """The largest multiple of a vector, below `LARGEST`, at which the greedy reply to no clean prompt opens with Y.

    Each halving costs one greedy decode of all prompts; the error at the end is `LARGEST` / 2^halvings.

    Args:
        model: the suspect.
        prompts: clean prompts.
        vectors: the first of them is measured.
        target_ids: the behaviour Y as token ids.
        halvings: number of multiples that are tried.
    """
    target = torch.tensor(target_ids, device=prompts.device)
    below, above = 0.0, LARGEST
    for _ in range(halvings):
        middle = (below + above) / 2
        fires = elicits(model, prompts, vectors.source_layer, middle * vectors.theta[:1], target)
        below, above = (below, middle) if bool(fires.any()) else (middle, above)
    return below
