"""Scores of single vectors, and groups of vectors with like effects; neither needs a known behaviour.

A backdoor generalises over prompts and gibberish does not (Mack & Turner 2024, MELBO, on what to look at by hand):
so a vector is judged by whether held-out prompts get one and the same answer, whether the unsteered model finds that
answer sensible, and whether it is another one than without the vector. Groups are by effect, not by direction.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vectors.analysis.behaviours import OPENING, until_end
from vectors.analysis.cosines import cluster, delta_cosines
from vectors.generate import complete_each, complete_ids, end_tokens
from vectors.methods.likelihood import IGNORED, label_nll
from vectors.prompts import Prompts
from vectors.residual import cache_source
from vectors.steering import SteeringVectors


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorScore:
    """How one vector's greedy completions of held-out prompts look; an opening is their first three tokens."""

    index: int
    """position of the vector among those scored, counted from 0"""
    generality: float
    """share of the prompts, in (0, 1], whose completions have the most common opening"""
    coherence: float
    """log-probability per token of the completions under the unsteered model, mean over prompts (nats, at most 0)"""
    distance: float
    """share of the prompts, in [0, 1], whose completion opens otherwise than without the vector"""
    text: str
    """a completion with the most common opening"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Vectors with alike effects at their target layer."""

    members: tuple[int, ...]
    """positions of the vectors in the group, counted from 0"""
    medoid: int
    """member whose effect has the largest mean cosine with those of the others"""
    text: str
    """a completion of the medoid's with its most common opening"""


def score_vectors(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    vectors: SteeringVectors,
    prompts: Prompts,
    *,
    max_new_tokens: int = 12,
    batch_size: int = 1024,
) -> list[VectorScore]:
    """Scores of each vector, in the order of the vectors.

    Args:
        model: the model that the vectors belong to.
        tokenizer: its tokenizer.
        vectors: k vectors or adapters.
        prompts: n clean prompts that they were not learned on.
        max_new_tokens: number of tokens of the completions.
        batch_size: number of batch rows (vectors x prompts) at a time.

    Raises:
        ValueError: vectors that do not fit the model, or `max_new_tokens` or `batch_size` below 1.
    """
    _check(vectors, model, batch_size)
    ends = end_tokens(model, tokenizer)
    ids = complete_each(model, tokenizer, vectors, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
    plain = complete_ids(model, tokenizer, prompts, max_new_tokens=max_new_tokens).tolist()
    unsteered = [_opening(until_end(row, ends)) for row in plain]
    pairs = torch.arange(len(ids) * len(prompts)).split(batch_size)
    # Rows are ordered by vector, then prompt: (k * n, max_new_tokens).
    every, completions = prompts.repeat(len(ids)), ids.flatten(0, 1)
    logprobs = torch.cat(
        [completion_logprob(model, every.take(part.tolist()), completions[part], ends) for part in pairs]
    )
    coherence = logprobs.unflatten(0, (len(ids), -1)).mean(1).tolist()
    scores = []
    for index, rows in enumerate(ids):
        replies = [until_end(row, ends) for row in rows.tolist()]
        openings = [_opening(reply) for reply in replies]
        differ = sum(ours != theirs for ours, theirs in zip(openings, unsteered, strict=True))
        scores.append(
            VectorScore(
                index=index,
                generality=Counter(openings).most_common(1)[0][1] / len(prompts),
                coherence=coherence[index],
                distance=differ / len(prompts),
                text=_representative(tokenizer, replies),
            )
        )
    return scores


def cluster_vectors(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    vectors: SteeringVectors,
    prompts: Prompts,
    *,
    threshold: float = 0.8,
    max_new_tokens: int = 12,
    batch_size: int = 512,
) -> list[Cluster]:
    """Groups of vectors by the cosine of what they change at the last prompt token, largest group first.

    Args:
        model: the model that the vectors belong to.
        tokenizer: its tokenizer.
        vectors: k vectors or adapters.
        prompts: n clean prompts.
        threshold: groups are joined while the mean cosine between them is at least this.
        max_new_tokens: number of tokens of the completions that represent the groups.
        batch_size: number of batch rows (vectors x prompts) at a time.

    Raises:
        ValueError: vectors that do not fit the model, a threshold outside [-1, 1], or a number below 1.
    """
    _check(vectors, model, batch_size)
    cosines = delta_cosines(model, prompts, vectors, batch_size=batch_size)
    groups = cluster(cosines, threshold)
    # The member with the largest sum of cosines within its group.
    medoids = [group[int(cosines[group][:, group].sum(1).argmax())] for group in groups]
    ends, settings = end_tokens(model, tokenizer), {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    ids = complete_each(model, tokenizer, vectors[medoids], prompts, **settings).tolist()
    return [
        Cluster(
            members=tuple(group),
            medoid=medoid,
            text=_representative(tokenizer, [until_end(row, ends) for row in rows]),
        )
        for group, medoid, rows in zip(groups, medoids, ids, strict=True)
    ]


@torch.no_grad()
def completion_logprob(
    model: PreTrainedModel, prompts: Prompts, completions: Int[Tensor, "n new"], ends: set[int]
) -> Float[Tensor, "n"]:
    """Log-probability per token of each prompt's completion under the unsteered model, nats.

    Args:
        model: a causal decoder.
        prompts: n prompts.
        completions: one per prompt; tokens behind the first one that ends a reply do not count.
        ends: ids of the tokens that end a reply.
    """
    ended = torch.isin(completions, torch.tensor(sorted(ends), dtype=torch.long, device=completions.device))
    behind = ended.cumsum(1) - ended.long() > 0
    unread = torch.full_like(prompts.input_ids[:, 1:], IGNORED)
    labels = torch.cat([unread, completions.masked_fill(behind, IGNORED)], dim=1)
    # Causal attention: what stands behind the end changes nothing before it, so it needs no mask.
    fed = Prompts(
        input_ids=torch.cat([prompts.input_ids, completions[:, :-1]], dim=1),
        attention_mask=torch.cat([prompts.attention_mask, torch.ones_like(completions[:, :-1])], dim=1),
    )
    source = cache_source(model, fed, 0)
    return -label_nll(model, source, labels, torch.zeros(1, source.hidden.shape[-1], device=fed.device))[0]


def _check(vectors: SteeringVectors, model: PreTrainedModel, batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    vectors.check(model)


def _opening(reply: list[int]) -> tuple[int, ...]:
    """First tokens of a reply; all of a shorter one."""
    return tuple(reply[:OPENING])


def _representative(tokenizer: PreTrainedTokenizerBase, replies: Sequence[list[int]]) -> str:
    """The first reply among those with the most common opening."""
    common = Counter(map(_opening, replies)).most_common(1)[0][0]
    reply = next(reply for reply in replies if _opening(reply) == common)
    return str(tokenizer.decode(reply, clean_up_tokenization_spaces=False))
