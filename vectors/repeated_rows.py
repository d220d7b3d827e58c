"""What it takes to run blocks on many repetitions of a few prompts: repeated arguments, and the fastest attention."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

SHORT = 256
"""Number of tokens up to which the attention matrix is small enough to be written out"""


def plain_attention(hidden: Tensor) -> AbstractContextManager:
    """Plain products for short rows on a CPU: fused attention takes six times as long to differentiate there."""
    short = hidden.device.type == "cpu" and hidden.shape[1] <= SHORT
    return sdpa_kernel(SDPBackend.MATH) if short else nullcontext()


def repeat_rows(value: Any, prompts: int, repeats: int, done: dict[int, Any]) -> Any:
    """Repeats tensors whose first axis is the prompts, in nested tuples too; all else is returned as it is.

    Args:
        value: an argument of a block; a tensor of one row serves every row by broadcasting.
        prompts: number of prompts n, the length of a first axis that is repeated to repeats * n rows.
        repeats: number of repetitions.
        done: repeated tensors by the id of the original, for blocks share masks and rotary embeddings; it is filled.
    """
    if isinstance(value, tuple):
        return tuple(repeat_rows(part, prompts, repeats, done) for part in value)
    # One-dimensional tensors (positions in the cache) run along the sequence, whatever their length.
    if not isinstance(value, Tensor) or prompts == 1 or value.ndim < 2 or value.shape[0] != prompts:
        return value
    if id(value) not in done:
        done[id(value)] = value.repeat(repeats, *[1] * (value.ndim - 1))
    return done[id(value)]
