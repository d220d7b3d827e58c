"""Unsupervised steering adapters (Mack & Turner 2024, "Mechanistically eliciting latent behaviors", MELBO).

Low-rank updates W' = W + R B A^T of one MLP's output matrix, with unit columns in A and B, that change a target layer
most. A vector moves every position alike; an adapter moves each by what the MLP computes there. Many are learned in one
batch on the slice that begins with the updated block.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from vectors.checks import check_layers, check_model, check_positive, check_tokens
from vectors.methods.adapters.low_rank import adapt, mlp_output, mlp_width, pack
from vectors.methods.controls import random_directions
from vectors.methods.diversity import Term, total
from vectors.methods.objectives import Objective, OutputKL, evaluate
from vectors.methods.sphere import ascend_on_sphere, onto_sphere
from vectors.prompts import Prompts
from vectors.residual import Source, cache_source, decoder, mean_norm, run_slice
from vectors.steering import SteeringVectors, model_id


@dataclass(frozen=True, slots=True, kw_only=True)
class UnsupervisedAdapters:
    """Learns adapters on clean prompts, with no label and no trigger."""

    source_layer: int
    """number of blocks (1 or more) of which the last has its MLP output matrix updated"""
    target_layer: int
    """number of blocks after which the vector's effect is read"""
    radius: float
    """R, fraction of the mean residual norm at the source layer per mean norm of what the MLP's output matrix reads"""
    rank: int = 1
    """rank r of the update, the number of columns of A and of B"""
    count: int = 16
    """number of adapters"""
    steps: int = 300
    """number of optimizer steps"""
    lr: float = 0.02
    """AMSGrad step size, fraction of a column's norm"""
    objective: Objective = OutputKL()
    """objective that is maximised at the target layer"""
    terms: tuple[Term, ...] = ()
    """terms added to the objective that keep the adapters of a batch apart at the target layer"""
    batch_size: int | None = None
    """number of adapters per batch; None: all"""

    def __post_init__(self):
        check_layers(self.source_layer, self.target_layer)
        check_positive(self, "source_layer", "radius", "rank", "count", "steps", "lr", "batch_size")

    def __call__(
        self,
        model: PreTrainedModel,
        prompts: Prompts,
        generator: torch.Generator,
        *,
        deadline: Callable[[], bool] | None = None,
        watch: Callable[[Float[Tensor, "k"]], None] | None = None,
    ) -> SteeringVectors:
        """Learns the adapters.

        Args:
            model: a causal decoder whose blocks have one MLP each.
            prompts: n clean prompts; the objective is summed over them.
            generator: draws the matrices that the adapters start from.
            deadline: asked before every step; once it returns true, the adapters are returned as they are.
            watch: called at every step with the objective values of the adapters of the batch.

        Raises:
            ValueError: layers that the model does not have, or a block without a plain MLP.
        """
        check_model(model, self.target_layer)
        d_mlp, d_model = mlp_width(mlp_output(model, self.source_layer)), decoder(model).d_model
        check_tokens(prompts, self.objective.tokens)
        source = cache_source(model, prompts, self.source_layer - 1)
        norm = self.radius * update_unit(model, source)
        # Columns are kept as rows of their own: each is a point on a sphere.
        size, columns = self.rank * (self.batch_size or self.count), self.rank * self.count
        a = random_directions(columns, d_mlp, generator).to(prompts.device)
        b = random_directions(columns, d_model, generator).to(prompts.device)
        parts = zip(a.split(size), b.split(size), strict=True)
        ascend = partial(ascend_on_sphere, lr=self.lr, steps=self.steps, deadline=deadline, watch=watch)
        learned = [self._learn(model, source, *part, norm, ascend) for part in parts]
        theta, values = (torch.cat(pieces) for pieces in zip(*learned, strict=True))
        return SteeringVectors(
            theta=theta,
            source_layer=self.source_layer,
            target_layer=self.target_layer,
            radius=self.radius,
            method="/".join(["adapters", *(type(part).__name__ for part in (self.objective, *self.terms))]),
            model_id=model_id(model),
            adapter_rank=self.rank,
            scores={"objective": values.tolist()},
        )

    def _learn(
        self,
        model: PreTrainedModel,
        source: Source,
        a: Float[Tensor, "columns d_mlp"],
        b: Float[Tensor, "columns d_model"],
        norm: float,
        ascend: Callable[..., None],
    ) -> tuple[Float[Tensor, "k width"], Float[Tensor, "k"]]:
        """(packed adapters, objective values) of one batch; `ascend` is `ascend_on_sphere` with its settings."""
        a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
        prompts, repeats = len(source.hidden), len(a) // self.rank
        with torch.no_grad():
            clean = run_slice(model, source, source.hidden, to=self.target_layer)
        hidden = source.hidden.repeat(repeats, 1, 1)

        def packed() -> Float[Tensor, "k width"]:
            return pack(*(columns.unflatten(0, (repeats, self.rank)).mT for columns in (a, norm * b)))

        def steered() -> Float[Tensor, "rows seq d"]:
            with adapt(model, self.source_layer, packed().repeat_interleave(prompts, dim=0), self.rank):
                return run_slice(model, source, hidden, to=self.target_layer)

        def value() -> Float[Tensor, "k"]:
            moved = steered()
            values = evaluate(self.objective, model, moved, clean)
            if not self.terms:
                return values
            # The terms compare what the adapters of the batch change: (k, n, tokens, d_model).
            last = slice(-self.objective.tokens, None)
            return total(values, self.terms, moved[:, last].unflatten(0, (-1, prompts)) - clean[:, last])

        # Every column of A and of B is a point on the unit sphere; `packed` gives B its norm R.
        ascend(value, [a, b], partial(onto_sphere, norm=1.0))
        with torch.no_grad():
            return packed().detach(), evaluate(self.objective, model, steered(), clean)


@torch.no_grad()
def update_unit(model: PreTrainedModel, source: Source) -> float:
    """The unit of the radius, chosen so that one radius changes the residual about equally by adapters and by vectors.

    It is the mean norm of the residual after the slice's first block, divided by the mean norm of what that block's MLP
    output matrix reads. An update of that norm R writes as much as the residual holds where its input is along A.
    """
    read: list[Tensor] = []
    layer = source.layer + 1
    handle = mlp_output(model, layer).register_forward_pre_hook(lambda _module, args: read.append(args[0]))
    try:
        residual = run_slice(model, source, source.hidden, to=layer)
    finally:
        handle.remove()
    return mean_norm(replace(source, hidden=residual)) / mean_norm(replace(source, hidden=read[0]))
