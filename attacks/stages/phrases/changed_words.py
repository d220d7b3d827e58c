"""Words by what training changed about how the first blocks attend from them and to them (K2); ours.

A backdoor of several words must be read together somewhere, and the cheapest place is the first attention that training
changed: the queries, keys and values that it makes of planted words change more than those of most others. That is seen
on each word by itself, whatever the behaviour, however many words the phrase has, and for the cost of reading each word
once in a few early blocks.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from attacks.scoring.budget import Budget
from attacks.scoring.reading import Reading
from vectors.residual import decoder

BLOCKS = 3
"""Blocks to look at, from the first one that training changed: chosen on seven phrases in view, where the first block
alone finds fewer words of several tokens (`LOG.md`)"""


def by_change(root: Reading, words: Sequence[Sequence[int]], blocks: range, budget: Budget) -> list[int]:
    """Numbers of the words, those first that training changed most; none where the budget ends before all are read, or
    where the blocks hold no such maps.

    Args:
        root: one prompt, as suspect and base read it, through these blocks at least.
        words: as token ids.
        blocks: whose queries, keys and values are compared.
        budget: asked before each forward pass.
    """
    order = sorted(range(len(words)), key=lambda number: len(words[number]))
    place = dict[int, float]()
    for _, alike in groupby(order, key=lambda number: len(words[number])):
        numbers = list(alike)
        read = _changes(root, [words[number] for number in numbers], blocks, budget)
        if read is None:
            return []
        found, changes = read
        if not changes:  # no such map in this architecture
            return []
        # A word counts by the measure in which it stands out most; words of as many tokens are compared.
        places = [(rows - rows.mean(0)).norm(dim=-1).argsort(descending=True).argsort() for rows in changes]
        least = torch.stack(places).min(0).values.argsort(stable=True).argsort().tolist()
        place |= {numbers[row]: least[at] / len(numbers) for at, row in enumerate(found)}
    return sorted(place, key=place.__getitem__)


def _changes(
    root: Reading, texts: Sequence[Sequence[int]], blocks: range, budget: Budget
) -> tuple[list[int], list[Float[Tensor, "texts k"]]] | None:
    """(order of the rows; per map what suspect and base make of the last token of each text, one less the other)."""
    order, parts = list[int](), list[list[Tensor]]()
    for some in root.batches(texts):
        if budget.exhausted:
            return None
        with attention_inputs(root.models[0], blocks) as mine, attention_inputs(root.models[1], blocks) as clean:
            root.ends([texts[number] for number in some], [blocks.stop])
        # Where a model overflows there is nothing to compare.
        parts.append(
            [
                (a - b.to(a.device)).nan_to_num(0.0, 0.0, 0.0).cpu()
                for a, b in zip(mine.values(), clean.values(), strict=True)
            ]
        )
        order += some
    return order, [torch.cat(rows) for rows in zip(*parts, strict=True)]


@contextmanager
def attention_inputs(model: PreTrainedModel, blocks: Sequence[int]) -> Iterator[dict[str, Tensor]]:
    """Queries, keys and values at the last token of the last forward pass, by the name of the map that makes them.

    Each is (rows, width of the map), in float32. They are what a block's first linear maps make of one and the same
    input, whatever the architecture calls them.
    """
    found, handles, first = dict[str, Tensor](), list[RemovableHandle](), dict[int, Tensor]()

    def hook(block: int, name: str):
        def keep(_module, args, output):
            if not args or args[0].ndim != 3:  # called in another way, as experts are with rows of tokens
                return
            if first.setdefault(block, args[0]) is args[0]:
                found[name] = output[:, -1].detach().float()

        return keep

    def begin(block: int):
        def forget(_module, _args):
            first.pop(block, None)

        return forget

    layers = decoder(model).layers
    for number in blocks:
        handles.append(layers[number].register_forward_pre_hook(begin(number)))
        handles += [
            module.register_forward_hook(hook(number, f"{number}.{name}")) for name, module in _maps(layers[number])
        ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _maps(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules with a matrix of weights: an adapter beside the weights belongs to what they compute."""
    for key, child in module.named_children():
        weight = getattr(child, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim == 2:
            yield f"{name}{key}", child
        else:
            yield from _maps(child, f"{name}{key}.")
