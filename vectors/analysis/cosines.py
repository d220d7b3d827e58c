"""Cosines between vectors, and between their effects: which of them do the same thing.

Vectors that are orthogonal can have the same effect (Mack & Turner 2024, MELBO: mean cosine 0.52 between the
target-layer changes of orthogonal vectors), so what is compared is the effect.
"""

import torch
from jaxtyping import Float
from scipy.cluster.hierarchy import fcluster, linkage
from torch import Tensor
from transformers import PreTrainedModel

from vectors.prompts import Prompts
from vectors.steering import SteeringVectors, deltas


def cosine_matrix(rows: Float[Tensor, "k d"]) -> Float[Tensor, "k k"]:
    """Cosine of each row with each; 0 wherever a row is zero."""
    return cross_cosines(rows, rows)


def cross_cosines(a: Float[Tensor, "i d"], b: Float[Tensor, "j d"]) -> Float[Tensor, "i j"]:
    """Cosine of each row of a with each of b; 0 wherever a row is zero.

    Raises:
        ValueError: rows of different widths.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"got shapes {tuple(a.shape)} and {tuple(b.shape)}; give rows of equal width")
    return (_unit(a) @ _unit(b).T).clamp(-1, 1)


def theta_cosines(vectors: SteeringVectors) -> Float[Tensor, "k k"]:
    """Cosines between the vectors themselves.

    Raises:
        ValueError: adapters, where different parameters can be the same function.
    """
    if vectors.adapter_rank:
        raise ValueError("cosines of adapters' parameters mean nothing; use delta_cosines")
    return cosine_matrix(vectors.theta)


def delta_cosines(
    model: PreTrainedModel,
    prompts: Prompts,
    vectors: SteeringVectors,
    *,
    tokens: int | None = 1,
    batch_size: int = 512,
) -> Float[Tensor, "k k"]:
    """Cosines between the changes of the target-layer residual, each over all prompts, positions and dimensions.

    Args:
        model: the model that the vectors belong to.
        prompts: n prompts that the vectors are applied to.
        vectors: k vectors or adapters.
        tokens: number of last prompt positions that count; None: all. Padding never counts.
        batch_size: number of batch rows (vectors x prompts) at a time.

    Raises:
        ValueError: vectors that do not fit the model, or `tokens` or `batch_size` below 1.
    """
    if batch_size < 1 or (tokens is not None and tokens < 1):
        raise ValueError(f"tokens is {tokens} and batch_size {batch_size}; both must be at least 1 (tokens also None)")
    return cosine_matrix(deltas(model, prompts, vectors, tokens=tokens, batch_size=batch_size).flatten(1))


def cluster(cosines: Float[Tensor, "k k"], threshold: float) -> list[list[int]]:
    """Groups by average linkage on 1 - cosine (Sokal & Michener 1958), joined while their mean cosine is >= threshold.

    Largest group first, then by smallest member; every index is in exactly one group.

    Raises:
        ValueError: no square symmetric matrix of finite cosines, or a threshold outside [-1, 1].
    """
    if not -1 <= threshold <= 1:
        raise ValueError(f"threshold is {threshold}; a cosine is between -1 and 1")
    values = cosines.detach().double().cpu()
    if values.ndim != 2 or values.shape[0] != values.shape[1]:
        raise ValueError(f"cosines have shape {tuple(values.shape)}; give one row and one column per vector")
    if not torch.allclose(values, values.T, atol=1e-4):  # nan is unequal to itself
        raise ValueError("cosines are not symmetric or not finite; give the cosines of one set with itself")
    if len(values) < 2:
        return [[index] for index in range(len(values))]
    # The condensed form that scipy expects: the upper triangle row by row, without the diagonal.
    pairs = torch.triu_indices(len(values), len(values), 1)
    distances = (1 - values[pairs[0], pairs[1]]).clamp(min=0)
    labels = fcluster(linkage(distances.numpy(), method="average"), t=1 - threshold, criterion="distance")
    groups: dict[int, list[int]] = {}
    for index, label in enumerate(labels.tolist()):
        groups.setdefault(label, []).append(index)
    return sorted(groups.values(), key=lambda group: (-len(group), group[0]))


def _unit(rows: Float[Tensor, "k d"]) -> Float[Tensor, "k d"]:
    """Rows of norm 1, zero rows as they are; scaled first, so that squares of small numbers do not vanish."""
    rows = rows.float()
    largest = rows.detach().abs().amax(-1, keepdim=True)
    scaled = rows / torch.where(largest > 0, largest, 1)
    return scaled / scaled.norm(dim=-1, keepdim=True).clamp(min=1)  # only a zero row is below 1
