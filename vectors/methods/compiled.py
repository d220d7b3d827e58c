"""Runs blocks compiled, for long optimisations: elementwise work, which is half of a step on a CPU, is fused."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from vectors.residual import decoder


@contextmanager
def compiled(model: PreTrainedModel, first: int, last: int) -> Iterator[None]:
    """Blocks first to last - 1 run compiled inside the context, and as before after it.

    A compilation takes seconds and belongs to one batch shape; on a CPU it needs a C++ compiler. Results change by
    rounding.
    """
    blocks = decoder(model).layers[first:last]
    # A block may have been compiled by the caller, and is so again after the context.
    before = [block._compiled_call_impl for block in blocks]
    try:
        for block in blocks:
            # In place: hooks on the blocks, which read and steer, still see every call.
            block.compile(dynamic=False)
        yield
    finally:
        for block, call in zip(blocks, before, strict=True):
            block._compiled_call_impl = call
