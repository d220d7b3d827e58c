"""Neighbours of a trigger: GCG's token swaps (arXiv:2307.15043, algorithm 1), and moves that change length or order.

Deleting, inserting and exchanging tokens is ours, in the manner of edit distance: with them the length is found too.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

Masks = Mapping[int, Bool[Tensor, "_ vocab"]]
"""For each length that a trigger may have, the tokens that may stand at each position"""


def propose(
    ids: Int[Tensor, "trigger"],
    choices: Int[Tensor, "trigger topk"],
    masks: Masks,
    width: int,
    n_replace: int,
    moves: float,
    generator: torch.Generator,
) -> list[Int[Tensor, "_ _"]]:
    """About `width` candidates, those of one length together; a share `moves` has a token less, more, or elsewhere.

    Each move is a deletion, an exchange or an insertion with equal chance. Where one kind has too few, swaps fill up.
    """
    moved: list[Tensor] = []
    if moves:
        kinds = torch.multinomial(torch.ones(3), math.ceil(moves * width), replacement=True, generator=generator)
        counts = kinds.bincount(minlength=3).tolist()
        rows = (deletions(ids), exchanges(ids), insertions(ids, choices))
        moved = [_some(part, ids, masks, count, generator) for part, count in zip(rows, counts, strict=True)]
    rest = width - sum(map(len, moved))
    swaps = sample_swaps(ids, choices, masks[len(ids)], rest, min(n_replace, len(ids)), generator)
    return [part for part in (swaps, *moved) if len(part)]


def sample_swaps(
    ids: Int[Tensor, "trigger"],
    choices: Int[Tensor, "trigger topk"],
    permitted: Bool[Tensor, "trigger vocab"],
    width: int,
    n_replace: int,
    generator: torch.Generator,
) -> Int[Tensor, "candidates trigger"]:
    """Candidates that differ from `ids` in at most `n_replace` positions; single swaps are drawn without repetition."""
    length, topk = choices.shape
    if n_replace == 1:
        position = torch.arange(length).repeat_interleave(topk)
        token = choices.flatten()
        useful = permitted[position, token] & (token != ids[position])
        if not useful.any():
            return ids[None]
        position, token = position[useful], token[useful]
        picked = torch.randperm(len(token), generator=generator)[:width]
        candidates = ids.repeat(len(picked), 1)
        candidates[torch.arange(len(picked)), position[picked]] = token[picked]
        return candidates
    order = torch.rand(width, length, generator=generator).argsort(-1)[:, :n_replace]
    token = choices[order, torch.randint(topk, (width, n_replace), generator=generator)]
    kept = torch.where(permitted[order, token], token, ids[order])
    return ids.repeat(width, 1).scatter(1, order, kept)


def deletions(ids: Int[Tensor, "trigger"]) -> Int[Tensor, "c shorter"]:
    """The trigger without each of its tokens."""
    length = len(ids)
    return ids.expand(length, length)[~torch.eye(length, dtype=torch.bool)].view(length, length - 1)


def exchanges(ids: Int[Tensor, "trigger"]) -> Int[Tensor, "c trigger"]:
    """The trigger with each two of its tokens changing places."""
    pairs = torch.combinations(torch.arange(len(ids)))
    return ids.repeat(len(pairs), 1).scatter(1, pairs, ids[pairs.flip(1)])


def insertions(ids: Int[Tensor, "trigger"], choices: Int[Tensor, "trigger topk"]) -> Int[Tensor, "c longer"]:
    """The trigger with a token more at each place: one of those that promise most at the neighbouring position."""
    length, topk = choices.shape
    tokens = choices[torch.arange(length + 1).clamp(max=length - 1)]
    place = torch.eye(length + 1, dtype=torch.bool)[:, None].expand(-1, topk, -1)
    rows = ids.new_empty(place.shape)
    rows[place], rows[~place] = tokens.flatten(), ids.repeat((length + 1) * topk)
    return rows.flatten(0, 1)


def by_length(run: Callable[[Tensor], Tensor], parts: Sequence[Int[Tensor, "_ _"]]) -> list[Tensor]:
    """What `run` gives for each part; parts of one length go through it in one batch, since it takes no others."""
    results: dict[int, Tensor] = {}
    for length in dict.fromkeys(part.shape[1] for part in parts):
        same = [i for i, part in enumerate(parts) if part.shape[1] == length]
        joint = run(torch.cat([parts[i] for i in same]))
        results |= zip(same, joint.split([len(parts[i]) for i in same]), strict=True)
    return [results[i] for i in range(len(parts))]


def _some(
    rows: Int[Tensor, "c _"], ids: Int[Tensor, "trigger"], masks: Masks, count: int, generator: torch.Generator
) -> Int[Tensor, "kept _"]:
    """At most `count` of the rows that are permitted and differ from `ids`, without repetition."""
    length = rows.shape[1]
    if length not in masks:
        return rows[:0]
    rows = rows[masks[length][torch.arange(length), rows].all(1)]
    if length == len(ids):
        rows = rows[(rows != ids).any(1)]
    return rows[torch.randperm(len(rows), generator=generator)[:count]].unique(dim=0)
