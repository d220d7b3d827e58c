"""Interactions of two parts of a text to first order, from one gradient of each part: millions of pairs at once; ours.

A part `a` that stands before a part `b` acts on it only by the keys and values that it leaves in each block. So the
residual at the last token of `b` behind `a` is, to first order about another part in the place of `a`, the residual
behind that one plus J_b (K_a - K), with K_a the keys and values of `a` and J_b the gradient by them. Sums over rows or
columns leave the interaction (J_b - mean J) (K_a - mean K): one matrix product for all pairs. It is an estimate:
attention weights change with the keys, and blocks are not linear. An average of J over several parts in the place of
`a` is better than J behind their mean. The pairs of largest estimate must be read.
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from attacks.discovery.comparison import Ids
from attacks.scoring.budget import Budget
from attacks.scoring.planning import forward_flops
from attacks.scoring.reading import Reading
from attacks.scoring.shared_prefix import SharedPrefix
from vectors.operations import add_executed
from vectors.residual import read

ROWS = 256
"""Texts in one pass with gradients"""


def lengths(
    root: Reading,
    befores: Sequence[Ids],
    afters: Sequence[Ids],
    anchors: Sequence[Ids],
    layer: int,
    directions: Float[Tensor, "d_model k"],
    budget: Budget,
) -> Float[Tensor, "befores afters"]:
    """Estimated lengths of the interactions of each part before with each part after; zero where the budget ends.

    Args:
        root: the prompt, as a model that keeps keys and values reads it.
        befores: all of as many tokens.
        afters: all of as many tokens.
        anchors: what stands in the place of the first part when gradients are taken, of as many tokens as `befores`.
        layer: after how many blocks the residual is read.
        directions: coordinates of the residual; the cost is proportional to how many there are.
        budget: asked before each batch of gradients.

    Raises:
        ValueError: the model keeps something else than keys and values.
    """
    if root.prefixes[0].layers is None:
        raise ValueError("the model keeps no keys and values; only such models have estimated interactions")
    size, model = len(befores[0]), root.models[0]
    keys = torch.cat([_kept(_behind(root, some), size, layer) for some in _batches(befores)])
    keys = keys - keys.mean(0)
    places = [_behind(root, [anchor]) for anchor in anchors]
    count, done = len(directions.T), 0
    products = torch.zeros(len(befores), len(afters), count)
    for some in _batches(afters):
        if budget.exhausted:
            return torch.zeros(len(befores), len(afters))
        each = [_gradients(model, place, size, some, layer, directions) for place in places]
        gradients = torch.stack(each).mean(0).flatten(0, 1)
        products[:, done : done + len(some)] = (keys @ gradients.T).view(len(befores), len(some), count).cpu()
        add_executed(2.0 * keys.numel() * len(gradients))
        done += len(some)
    return (products - products.mean(1, keepdim=True)).norm(dim=-1)


def lengths_flops(
    root: Reading, shape: tuple[int, int], sizes: tuple[int, int], anchors: int, layer: int, k: int
) -> float:
    """What `lengths` costs for that many parts before and after, of that many tokens each."""
    width = sum(part[0, :, 0].numel() for both in (root.prefixes[0].layers or ())[:layer] for part in both)
    products = 2.0 * shape[0] * sizes[0] * width * k * shape[1]
    tokens = shape[0] * sizes[0] + anchors * shape[1] * sizes[1] * (1 + k)
    return forward_flops(root.models[0], tokens, last=layer) + products


def _batches(parts: Sequence[Ids]) -> Iterator[Sequence[Ids]]:
    for start in range(0, len(parts), ROWS):
        yield parts[start : start + ROWS]


def _behind(root: Reading, parts: Sequence[Ids]) -> SharedPrefix:
    """The prompt with each part behind it, as the first model reads it."""
    reading = Reading(root.models[:1], root.prefixes[:1])
    for tokens in zip(*parts, strict=True):
        reading = reading.extended(torch.tensor(tokens))
    return reading.prefixes[0]


def _kept(prefix: SharedPrefix, size: int, layer: int) -> Float[Tensor, "rows width"]:
    """Keys and values of the last tokens."""
    each = [part for both in (prefix.layers or ())[:layer] for part in both]
    # Blocks may lie on several devices.
    return torch.cat([part[:, :, -size:].flatten(1).float().to(prefix.ids.device) for part in each], dim=1)


def _gradients(
    model: PreTrainedModel,
    prefix: SharedPrefix,
    size: int,
    afters: Sequence[Ids],
    layer: int,
    directions: Float[Tensor, "d_model k"],
) -> Float[Tensor, "afters k width"]:
    """Of each coordinate at the last token of each part, by keys and values of the last tokens of the only row."""
    cache, leaves = DynamicCache(), list[Tensor]()
    ids = torch.tensor(afters, device=prefix.ids.device)
    with torch.enable_grad():
        for number, both in enumerate((prefix.layers or ())[:layer]):
            grown = [part.expand(len(afters), *part.shape[1:]) for part in both]
            mine = [part[:, :, -size:].clone().requires_grad_() for part in grown]
            leaves += mine
            whole = [torch.cat([part[:, :, :-size], leaf], dim=2) for part, leaf in zip(grown, mine, strict=True)]
            cache.update(whole[0], whole[1], number)
        mask = torch.ones(len(afters), prefix.ids.shape[1] + ids.shape[1], dtype=torch.long, device=ids.device)
        hidden = read(model, input_ids=ids, attention_mask=mask, past_key_values=cache, layers=[layer])[layer][:, -1]
        coordinates = hidden.float() @ directions.to(hidden.device)
        each = [torch.autograd.grad(one.sum(), leaves, retain_graph=True) for one in coordinates.unbind(1)]
    # One backward pass is counted with the forward pass.
    add_executed((len(each) - 1) * forward_flops(model, ids.numel(), last=layer))
    rows = [torch.cat([part.flatten(1).float().to(ids.device) for part in some], dim=1) for some in each]
    return torch.stack(rows, dim=1)
