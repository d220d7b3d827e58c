"""A clock of floating-point operations: what models have executed in this process, counted where it happens.

Budgets read this clock as they read the time of day, so that no algorithm books its own cost and none can forget to.
Hooks on every block and on the unembedding count matrix products: 2 operations per weight and token in a forward pass,
as many again for the backward pass to the block's input (weights are frozen, so no gradient of theirs is computed).
Attention scores and elementwise work are left out: on prompts of a hundred tokens they are a few per cent.
"""

import math
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from vectors.residual import decoder, stream

_executed = 0.0


def executed() -> float:
    """Operations that counted models have executed in this process so far."""
    return _executed


def add_executed(operations: float) -> None:
    """Moves the clock on by what other processes have executed for this one."""
    global _executed
    _executed += operations


def count_operations(model: PreTrainedModel) -> None:
    """Counts what this model executes from now on; asking again changes nothing.

    Raises:
        ValueError: the model has no plain decoder.
    """
    parts = decoder(model)
    for module in (*parts.layers, parts.head):
        # A copied model brings its hooks along: look at the module, not at a list of models.
        if not any(isinstance(hook, _Counter) for hook in module._forward_hooks.values()):
            module.register_forward_hook(_Counter(weights_of(module)))


def weights_of(module: nn.Module) -> int:
    """Number of weights that take part in matrix products: all but biases and norms."""
    return sum(map(count_of, (weight for weight in module.parameters() if weight.ndim > 1)))


def count_of(weight: Tensor) -> int:
    """Number of weights in a tensor; bitsandbytes packs two of 4 bits into a byte, and keeps the true shape beside."""
    packed = getattr(weight, "quant_state", None)
    return weight.numel() if packed is None else math.prod(packed.shape)


class _Counter:
    """A forward hook that adds the operations of a call to the clock and changes nothing else."""

    def __init__(self, weights: int):
        self.weights = weights

    def __call__(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        global _executed
        hidden: Tensor = stream(output)
        tokens = hidden.shape[:-1].numel()
        # What is differentiable will be differentiated: nothing here keeps a graph without using it.
        _executed += 2.0 * self.weights * tokens * (2 if hidden.requires_grad else 1)
