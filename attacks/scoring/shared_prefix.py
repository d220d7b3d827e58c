"""Candidates that begin with the same tokens, so that what they share is run once."""

import torch
from jaxtyping import Int
from torch import Tensor


def alike(candidates: Int[Tensor, "c trigger"], least: int) -> list[Int[Tensor, "k"]]:
    """Indices of the candidates, in families that begin with the same tokens; each candidate is in one family.

    A family whose members go on alike is split by the next token, as long as the parts have at least `least` members;
    the members of smaller parts stay together, with what they share. A batch of swaps in one trigger falls into one
    family per position, since a swap at position k leaves the k tokens before it as they were.

    Args:
        candidates: c triggers as ids.
        least: members below which a family is not worth a forward pass of its own.
    """
    # Each entry is (indices of candidates, how many tokens they are known to share).
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
