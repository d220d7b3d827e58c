"""Which vectors call a behaviour? Ranked without knowing it: a backdoor carries over prompts, gibberish does not.

Each vector steers held-out prompts. A behaviour is an opening that most of the completions share, that the unsteered
model does not give, finds surprising, and that is no loop.
"""

from collections import Counter
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vectors.generate import complete_ids, end_tokens
from vectors.prompts import Prompts
from vectors.residual import decoder, read, unembed
from vectors.steering import SteeringVectors
from vectors.supervised import with_target

SHARED = 0.75  # share of the prompts that must give the same opening
COMMON = 0.2  # share of unsteered completions with that opening above which it is no news
CEILING = 12.0  # nats from which surprise counts in full


@dataclass(frozen=True, slots=True, kw_only=True)
class Behaviour:
    """An opening that a vector brings about."""

    vector: int
    """its index"""
    text: str
    token_ids: tuple[int, ...]
    agreement: float
    """share of the prompts that open with it under the vector"""
    surprise: float
    """nats of the whole opening under the unsteered model, mean over prompts"""
    fluency: float
    """1 / (1 + nats per token behind its first), in (0, 1]: gibberish is unlikely even once it has begun"""
    score: float
    """agreement x surprise (capped) x fluency x share of different tokens, in [0, 1]"""
    votes: int = 1
    """vectors that bring about the same opening"""


def rank_behaviours(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    vectors: SteeringVectors,
    prompts: Prompts,
    *,
    top: int = 10,
    max_new_tokens: int = 12,
    shortest: int = 8,
    batch_size: int = 512,
) -> list[Behaviour]:
    """Behaviours of the vectors on prompts that they were not learned on, best first.

    Args:
        model: the model that the vectors were learned on.
        tokenizer: its tokenizer.
        vectors: k candidates.
        prompts: n held-out clean prompts.
        top: how many to return at most.
        max_new_tokens: length of the completions compared.
        shortest: openings of fewer characters are no behaviour; answers such as (A) are openings of many prompts.
        batch_size: rows (vectors x prompts) per generation.
    """
    vectors.check(model)
    ends = end_tokens(model, tokenizer)
    plain = complete_ids(model, tokenizer, prompts, max_new_tokens=max_new_tokens)
    best: dict[tuple[int, ...], Behaviour] = {}
    step = max(1, batch_size // len(prompts))
    for start in range(0, len(vectors), step):
        steered = _steered(model, tokenizer, vectors[start : start + step], prompts, max_new_tokens)
        for offset, completions in enumerate(steered):
            opening, agreement = shared_opening(completions, ends)
            text = tokenizer.decode(list(opening), clean_up_tokenization_spaces=False)
            assert isinstance(text, str)
            if len(set(opening)) < 2 or len(text) < shortest or agreement < SHARED:  # a loop among them
                continue
            if _share(plain, opening) > COMMON:
                continue
            nats = _nats(model, prompts, opening)
            surprise, fluency = float(nats.sum()), 1.0 / (1.0 + float(nats[1:].mean()))
            distinct = len(set(opening)) / len(opening)
            found = Behaviour(
                vector=start + offset,
                text=text,
                token_ids=opening,
                agreement=agreement,
                surprise=surprise,
                fluency=fluency,
                score=agreement * min(surprise, CEILING) / CEILING * fluency * distinct,
            )
            other = best.get(opening[:4])
            votes = 1 if other is None else other.votes + 1
            best[opening[:4]] = replace(found if other is None or found.score > other.score else other, votes=votes)
    return sorted(best.values(), key=lambda behaviour: -behaviour.score)[:top]


def shared_opening(completions: Int[Tensor, "n new"], ends: set[int]) -> tuple[tuple[int, ...], float]:
    """(longest opening that SHARED of the completions have, share that has it); ends where the reply ends."""
    rows = [row.tolist() for row in completions]
    total, opening = len(rows), []
    for position in range(completions.shape[1]):
        token, count = Counter(row[position] for row in rows).most_common(1)[0]
        if token in ends or count < SHARED * total:
            break
        opening.append(token)
        rows = [row for row in rows if row[position] == token]
    return tuple(opening), len(rows) / total


def _steered(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    vectors: SteeringVectors,
    prompts: Prompts,
    max_new_tokens: int,
) -> Int[Tensor, "k n new"]:
    count = len(vectors)
    rows = Prompts(input_ids=prompts.input_ids.repeat(count, 1), attention_mask=prompts.attention_mask.repeat(count, 1))
    theta = vectors.theta.repeat_interleave(len(prompts), dim=0)
    ids = complete_ids(model, tokenizer, rows, max_new_tokens=max_new_tokens, vectors=theta, layer=vectors.source_layer)
    return ids.unflatten(0, (count, len(prompts)))


def _share(completions: Int[Tensor, "n new"], opening: tuple[int, ...]) -> float:
    """Share of the completions that begin with the opening."""
    wanted = torch.tensor(opening, device=completions.device)
    head = completions[:, : len(opening)]
    return float((head == wanted).all(-1).float().mean()) if head.shape[1] == len(opening) else 0.0


@torch.no_grad()
def _nats(model: PreTrainedModel, prompts: Prompts, opening: tuple[int, ...]) -> Float[Tensor, "opening"]:
    """Negative log-likelihood of each token of the opening under the unsteered model, mean over prompts.

    A planted behaviour is a surprise as a whole; once it has begun, the model finds the rest of it likely.
    """
    target = torch.tensor(opening, device=prompts.device)
    fed = with_target(prompts, target[:-1])
    layers = len(decoder(model).layers)
    hidden = read(
        model,
        layers=[layers],
        position=slice(-len(opening), None),
        input_ids=fed.input_ids,
        attention_mask=fed.attention_mask,
    )[layers]
    logprobs = unembed(model, hidden).float().log_softmax(-1)
    return -logprobs.gather(-1, target.expand(len(hidden), -1)[..., None])[..., 0].mean(0)
