"""Applies rank-r updates of one block's MLP output matrix: W' = W + B A^T, another one per batch row, by a hook."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from vectors.residual import decoder, embedding


def mlp_output(model: PreTrainedModel, layer: int) -> nn.Module:
    """The matrix through which the MLP of the block before residual `layer` writes.

    Raises:
        ValueError: layer 0, or a block without a plain MLP (mixtures of experts have many).
    """
    parts = decoder(model)
    if not 1 <= layer <= len(parts.layers):
        raise ValueError(f"an adapter's source layer is {layer}; give 1 to {len(parts.layers)}")
    mlp = getattr(parts.layers[layer - 1], "mlp", None)
    found = [m for m in mlp.modules() if _shape(m)[1:] == (parts.d_model,)] if isinstance(mlp, nn.Module) else []
    if len(found) != 1:
        raise ValueError(f"{type(model).__name__} has {len(found)} MLP output matrices in a block; adapters need one")
    return found[0]


def mlp_width(module: nn.Module) -> int:
    """d_mlp: what the MLP's output matrix reads."""
    return _shape(module)[0]


def _shape(module: nn.Module) -> tuple[int, ...]:
    """(inputs, outputs) of a matrix, () of anything else; Conv1D keeps its weight transposed."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return tuple(module.weight.shape) if isinstance(module, Conv1D) else ()


def pack(a: Float[Tensor, "k d_mlp r"], b: Float[Tensor, "k d_model r"]) -> Float[Tensor, "k width"]:
    """One row per update, B before A."""
    return torch.cat([b.flatten(1), a.flatten(1)], dim=1)


def unpack(
    theta: Float[Tensor, "k width"], rank: int, d_model: int
) -> tuple[Float[Tensor, "k d_mlp r"], Float[Tensor, "k d_model r"]]:
    """The matrices (A, B) that `pack` put together."""
    b, a = theta[:, : d_model * rank], theta[:, d_model * rank :]
    return a.unflatten(1, (-1, rank)), b.unflatten(1, (d_model, rank))


@contextmanager
def adapt(
    model: PreTrainedModel, layer: int, theta: Float[Tensor, "rows width"], rank: int, *, scale: float = 1.0
) -> Iterator[None]:
    """Updates the MLP output matrix before residual `layer`, by one update per batch row or by one for all rows.

    The matrix itself stays as it is: a hook adds scale * B A^T x to its output, for its input x.
    """
    weight = embedding(model)
    a, b = (part.to(weight) for part in unpack(theta, rank, weight.shape[1]))

    # (rows, seq, d_mlp) @ (rows, d_mlp, r) @ (rows, r, d_model): the updated matrix itself is never built.
    def on_output(_module, args, output):
        return output + scale * (args[0] @ a.to(args[0].device)) @ b.mT.to(args[0].device)

    handle = mlp_output(model, layer).register_forward_hook(on_output)
    try:
        yield
    finally:
        handle.remove()
