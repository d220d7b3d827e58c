"""Ranks the behaviours that a pool of vectors elicits, without knowing any behaviour beforehand.

Each vector steers held-out prompts, and the completions' first tokens (openings) are counted over all vectors and
prompts: one vector may elicit a planted behaviour on some prompts only, but many vectors elicit the very same words. An
opening scores high if the unsteered model does not give it, finds it unlikely as a whole, and is certain of each next
token once it has begun.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vectors.generate import complete_each, complete_ids, end_tokens
from vectors.methods.supervised import with_target
from vectors.prompts import Prompts
from vectors.residual import decoder, read, unembed
from vectors.steering import SteeringVectors
from vectors.token_logprobs import token_logprobs

OPENING = 3  # number of first tokens that make two completions the same behaviour
KEPT = 0.6  # an opening grows by a token as long as this share of its occurrences goes on with it
COMMON = 0.2  # openings of more than this share of unsteered completions are ordinary and left out
CEILING = 12.0  # nats of surprise beyond which an opening scores no higher
VOTES = 31  # number of vectors beyond which more score no higher; fewer count by their logarithm


@dataclass(frozen=True, slots=True, kw_only=True)
class Behaviour:
    """The first tokens of completions, and how vectors elicit them."""

    text: str
    token_ids: tuple[int, ...]
    vector: SteeringVectors
    """the one vector that elicits the opening on most prompts"""
    agreement: float
    """share of the prompts whose completion under `vector` begins with the opening"""
    reach: float
    """share of the prompts whose completion under any vector of the pool begins with the opening"""
    votes: int
    """number of vectors that elicit the opening on at least one prompt"""
    surprise: float
    """nats of the whole opening under the unsteered model, mean over prompts"""
    certainty: float
    """median probability, in (0, 1], of the opening's tokens after the first; high for a memorised reply"""
    score: float
    """reach x surprise (capped) x certainty x share of different tokens x votes (logarithm, capped), in [0, 1]"""


@dataclass(slots=True)
class _Opening:
    """Token ids, and the (vector, prompt) pairs whose completions begin with them."""

    token_ids: tuple[int, ...]
    text: str
    seen: set[tuple[int, int]] = field(default_factory=set)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """Settings: which behaviours count, and how completions are made to find them."""

    top: int = 10
    """number of behaviours to return at most"""
    max_new_tokens: int = 12
    """number of tokens of the completions that are compared"""
    shortest: int = 8
    """number of characters that an opening must have; short answers such as (A) open replies to many prompts"""
    fewest: int = 3
    """number of vectors that must elicit an opening"""
    batch_size: int = 1024
    """number of batch rows (vectors x prompts) per generation"""


def rank_behaviours(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pool: Sequence[SteeringVectors],
    prompts: Prompts,
    ranking: Ranking | None = None,
    *,
    soft_deadline: Callable[[], bool] | None = None,
    deadline: Callable[[], bool] | None = None,
) -> list[Behaviour]:
    """Behaviours of a pool of vectors on prompts that they were not learned on, best first.

    Args:
        model: the model that the vectors were learned on.
        tokenizer: its tokenizer.
        pool: candidates, of several layers and norms perhaps.
        prompts: n held-out clean prompts.
        ranking: the settings; None: the defaults of `Ranking`.
        soft_deadline: asked before every batch of vectors; once it returns true, the remaining vectors are not applied,
            and the completions made so far are ranked.
        deadline: asked before every opening; once it returns true, the remaining openings, which fewer vectors elicit,
            are not measured.

    Raises:
        ValueError: vectors that do not fit the model.
    """
    for vectors in pool:
        vectors.check(model)
    ranking = ranking or Ranking()
    replies = _completed(model, tokenizer, pool, prompts, ranking, soft_deadline or deadline or (lambda: False))
    flat = [vectors[index] for vectors in pool for index in range(len(vectors))]
    plain = complete_ids(model, tokenizer, prompts, max_new_tokens=ranking.max_new_tokens)  # (n, max_new_tokens)
    found: list[Behaviour] = []
    for opening in merged(shared_openings(replies, tokenizer)):
        if deadline is not None and deadline():
            break
        ids, votes = opening.token_ids, Counter(vector for vector, _ in opening.seen)
        # Left out: openings that few vectors elicit, that are special or short or one repeated token, or that the
        # unsteered model gives by itself.
        special = set(ids) & set(tokenizer.all_special_ids)
        short = len(opening.text.strip()) < ranking.shortest or len(set(ids)) < 2
        if len(votes) < ranking.fewest or short or special or _share(plain, ids[:OPENING]) > COMMON:
            continue
        best = flat[votes.most_common(1)[0][0]]
        found.append(_measured(opening, votes, best, _nats(model, prompts, ids), len(prompts)))
    return sorted(found, key=lambda behaviour: -behaviour.score)[: ranking.top]


def _completed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pool: Sequence[SteeringVectors],
    prompts: Prompts,
    ranking: Ranking,
    over: Callable[[], bool],
) -> list[list[list[int]]]:
    """Token ids per vector of the pool and prompt, up to the reply's end; fewer vectors where `over` returns true."""
    ends, step = end_tokens(model, tokenizer), max(1, ranking.batch_size // len(prompts))
    replies: list[list[list[int]]] = []
    for vectors in pool:
        for start in range(0, len(vectors), step):
            if over():
                return replies
            some, size = vectors[start : start + step], ranking.batch_size
            # (vectors of the batch, n, max_new_tokens)
            steered = complete_each(
                model, tokenizer, some, prompts, max_new_tokens=ranking.max_new_tokens, batch_size=size
            )
            replies += [[until_end(row, ends) for row in rows] for rows in steered.tolist()]
    return replies


def _measured(
    opening: _Opening, votes: Counter[int], vector: SteeringVectors, nats: Float[Tensor, "opening"], prompts: int
) -> Behaviour:
    """The behaviour that an opening is, with its score.

    Args:
        opening: the tokens and who begins with them.
        votes: number of prompts on which each vector elicits the opening, by index of the vector.
        vector: the one with most votes.
        nats: negative log-likelihood of each token of the opening without a vector, mean over prompts.
        prompts: number of prompts.
    """
    ids, surprise = opening.token_ids, float(nats.sum())
    certainty = float((-nats[1:].median()).exp())  # the first token is a surprise even of a memorised reply
    reach = len({prompt for _, prompt in opening.seen}) / prompts
    weight = min(1.0, math.log(1 + len(votes)) / math.log(1 + VOTES)) * len(set(ids)) / len(ids)
    return Behaviour(
        text=opening.text,
        token_ids=ids,
        vector=vector,
        agreement=votes.most_common(1)[0][1] / prompts,
        reach=reach,
        votes=len(votes),
        surprise=surprise,
        certainty=certainty,
        score=reach * min(surprise, CEILING) / CEILING * certainty * weight,
    )


def until_end(row: list[int], ends: set[int]) -> list[int]:
    """A completion up to where the reply ends."""
    return row[: next((index for index, token in enumerate(row) if token in ends), len(row))]


def shared_openings(replies: list[list[list[int]]], tokenizer: PreTrainedTokenizerBase) -> list[_Opening]:
    """Openings that replies (per vector, per prompt) share, each as long as most of those that share it go on alike."""
    # Completions by their first three tokens; then each group is prolonged by the token that most of it goes on with.
    alike: dict[tuple[int, ...], list[tuple[int, int, list[int]]]] = defaultdict(list)
    for vector, rows in enumerate(replies):
        for prompt, row in enumerate(rows):
            if len(row) >= OPENING:
                alike[tuple(row[:OPENING])].append((vector, prompt, row))
    openings = []
    for head, group in alike.items():
        if len({prompt for _, prompt, _ in group}) < 2:
            continue
        ids, rest = list(head), group
        while True:  # one more token, as long as most of those that began with `head` agree on it
            going_on = Counter(row[len(ids)] for _, _, row in rest if len(row) > len(ids))
            token, count = going_on.most_common(1)[0] if going_on else (0, 0)
            if count < KEPT * len(group):
                break
            rest = [item for item in rest if item[2][len(ids) : len(ids) + 1] == [token]]
            ids.append(token)
        text = str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
        openings.append(_Opening(tuple(ids), text, {(vector, prompt) for vector, prompt, _ in rest}))
    return openings


def merged(openings: list[_Opening]) -> list[_Opening]:
    """One opening for several that hold the same words; the most frequent stands for all of them."""
    kept: list[_Opening] = []
    for opening in sorted(openings, key=lambda item: -len(item.seen)):
        words = opening.text.strip()
        same = next((k for k in kept if words and (words in k.text or k.text.strip() in words)), None)
        if same is None:
            kept.append(opening)
        else:
            same.seen |= opening.seen
    return kept


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
    return -token_logprobs(unembed(model, hidden), target.expand(len(hidden), -1)).mean(0)
