"""Unsupervised steering vectors (Mack & Turner 2024, "Mechanistically eliciting latent behaviors", MELBO).

Perturbations of fixed norm at a source layer that change a target layer most. Here many are learned in one batch on the
slice between the two layers, from source activations computed once; nothing else of the model runs.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from vectors.checks import check_layers, check_model, check_positive, check_tokens
from vectors.methods.compiled import compiled
from vectors.methods.controls import random_directions
from vectors.methods.diversity import Term, total
from vectors.methods.objectives import Objective, OutputKL, evaluate
from vectors.methods.sphere import ascend_on_sphere, onto_sphere
from vectors.prompts import Prompts
from vectors.residual import Source, cache_source, decoder, mean_norm, run_slice
from vectors.steering import SteeringVectors, model_id


@dataclass(frozen=True, slots=True, kw_only=True)
class UnsupervisedVectors:
    """Learns vectors on clean prompts, with no label and no trigger."""

    source_layer: int
    """number of blocks after which the vector is added"""
    target_layer: int
    """number of blocks after which the vector's effect is read"""
    radius: float
    """norm of the vectors, fraction of the mean residual norm at the source layer"""
    count: int = 64
    """number of vectors"""
    steps: int = 300
    """number of optimizer steps"""
    lr: float = 0.02
    """AMSGrad step size, fraction of the norm"""
    objective: Objective = OutputKL()
    """objective that is maximised at the target layer"""
    terms: tuple[Term, ...] = ()
    """terms added to the objective that keep the vectors of a batch apart at the target layer"""
    orthogonal: Literal["none", "hard"] = "none"
    """hard: every vector is kept orthogonal to all others, those of earlier batches included; none: no constraint"""
    batch_size: int | None = None
    """number of vectors per batch; None: all"""
    compile: bool = False
    """compile the blocks between the layers, which halves the time per step on a CPU, costs some 15 seconds before the
    first step, and so pays from about a thousand steps"""

    def __post_init__(self):
        check_layers(self.source_layer, self.target_layer)
        check_positive(self, "radius", "count", "steps", "lr", "batch_size")

    def __call__(
        self,
        model: PreTrainedModel,
        prompts: Prompts,
        generator: torch.Generator,
        *,
        deadline: Callable[[], bool] | None = None,
        watch: Callable[[Float[Tensor, "k"]], None] | None = None,
    ) -> SteeringVectors:
        """Learns the vectors.

        Args:
            model: a causal decoder.
            prompts: n clean prompts; the objective is summed over them.
            generator: draws the directions that the vectors start from.
            deadline: asked before every step; once it returns true, the vectors are returned as they are.
            watch: called at every step with the values, terms included, of the vectors of the batch.

        Raises:
            ValueError: layers that the model does not have, more orthogonal vectors than dimensions, or prompts
                shorter than the positions read.
        """
        check_model(model, self.target_layer, self.count if self.orthogonal == "hard" else 0)
        check_tokens(prompts, self.objective.tokens)
        source = cache_source(model, prompts, self.source_layer)
        norm = self.radius * mean_norm(source)
        start = norm * random_directions(self.count, decoder(model).d_model, generator).to(source.hidden.device)
        # Batches one after another; with hard orthogonality each is kept apart from the vectors learned before it.
        theta, values = start[:0], []
        ascend = partial(ascend_on_sphere, lr=self.lr * norm, steps=self.steps, deadline=deadline, watch=watch)
        for part in start.split(self.batch_size or self.count):
            project = partial(onto_sphere, norm=norm, earlier=theta if self.orthogonal == "hard" else None)
            learned, value = self._learn(model, source, part, project, ascend)
            theta = torch.cat([theta, learned])
            values += value.tolist()
        return SteeringVectors(
            theta=theta,
            source_layer=self.source_layer,
            target_layer=self.target_layer,
            radius=self.radius,
            method="/".join(["unsupervised", *(type(part).__name__ for part in (self.objective, *self.terms))]),
            model_id=model_id(model),
            scores={"objective": values},
        )

    def _learn(
        self,
        model: PreTrainedModel,
        source: Source,
        start: Float[Tensor, "k d"],
        project: Callable[[Tensor], Tensor],
        ascend: Callable[..., None],
    ) -> tuple[Float[Tensor, "k d"], Float[Tensor, "k"]]:
        """(vectors, objective values) of one batch.

        Args:
            model: a causal decoder.
            source: activations of the n prompts.
            start: where the vectors begin, of any norm.
            project: `onto_sphere` with the norm and the vectors of earlier batches filled in.
            ascend: `ascend_on_sphere` with step size, steps, deadline and watch filled in.
        """
        theta = project(start).requires_grad_()
        with torch.no_grad():  # (n, seq, d_model), the same at every step
            clean = run_slice(model, source, source.hidden, to=self.target_layer)

        def value() -> Float[Tensor, "k"]:
            steered = run_slice(model, source, steered_source(source, theta), to=self.target_layer)
            values = evaluate(self.objective, model, steered, clean)
            if not self.terms:
                return values
            # The terms compare what the vectors of the batch change: (k, n, tokens, d_model).
            last = slice(-self.objective.tokens, None)
            return total(values, self.terms, steered[:, last].unflatten(0, (-1, len(clean))) - clean[:, last])

        with compiled(model, self.source_layer, self.target_layer) if self.compile else nullcontext():
            ascend(value, [theta], project)
        with torch.no_grad():  # the values after the last step, without terms
            steered = run_slice(model, source, steered_source(source, theta), to=self.target_layer)
            return theta.detach(), evaluate(self.objective, model, steered, clean)


def steered_source(source: Source, theta: Float[Tensor, "k d"]) -> Float[Tensor, "rows seq d"]:
    """Source activations with each vector added at every position, rows vector-major."""
    return (source.hidden + theta[:, None, None].to(source.hidden.dtype)).flatten(0, 1)
