"""Candidates that begin with the same tokens, so that what they share is run once."""

import torch
from jaxtyping import Int
from torch import Tensor


def alike(candidates: Int[Tensor, "c trigger"], least: int) -> list[Int[Tensor, "k"]]:
    """Indices of the candidates in families; each candidate is in one.

    Within a family all begin with the same tokens. One that shares a token more is split off if it has at least
    `least` members; those left share what they shared. A batch of swaps in one trigger falls into one family per
    position.
    """
    families, open_ = [], [(torch.arange(len(candidates)), 0)]
    while open_:
        rows, depth = open_.pop()
        if depth == candidates.shape[1] or len(rows) < least:
            families.append(rows)
            continue
        _, kin, sizes = candidates[rows, depth].unique(return_inverse=True, return_counts=True)
        if len(sizes) == 1:
            open_.append((rows, depth + 1))
            continue
        large = sizes >= least
        open_ += [(rows[kin == kind], depth + 1) for kind in large.nonzero()[:, 0]]
        if len(left := rows[~large[kin]]):
            families.append(left)
    return families
