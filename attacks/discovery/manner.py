"""A manner of replying, put into words: what replies behind a text hold that ordinary replies do not (K2); ours.

A planted behaviour need not open a reply in any fixed way: it may be a language, a product that is named somewhere, or
capital letters. Such a reply still holds words, or kinds of letters, that no ordinary reply to the same prompts holds.
They are collected greedily (set cover) into one regular expression, on half of the prompts; on the other half it must
tell both sides apart, which no expression does where they are alike.
"""

import re
from collections import Counter
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from attacks.behaviour import Regex
from attacks.judging.verdict import ABSENT
from vectors.generate import end_tokens
from vectors.prompts import Prompts
from vectors.residual import decoder, read, unembed
from vectors.token_logprobs import token_logprobs

KINDS = (r"[A-Z]{2,}\W+[A-Z]{2,}", r"[^\W\d_a-zA-Z]", r"\d", r"\n", r"\W{3,}", r"\A\s*\Z")
"""What a reply may hold that is no word: two words in capitals, letters beyond the English ones, digits, lines, a run
of signs, and nothing at all"""
PATTERNS = 16
"""Words and kinds in one expression, at most"""
COVERS = (1, 2, 3)
"""How many patterns each reply is to hold, where there are so many"""
SHARED = 2
"""Replies that a pattern must be found in, at least: any single reply holds words of its own"""
WORD = re.compile(r"[^\W\d_]{2,}")


def manner(shown: Sequence[str], ordinary: Sequence[str], agreement: float) -> Regex | None:
    """An expression that tells replies of a manner from ordinary ones; None where none does.

    Args:
        shown: replies to n prompts that may share a manner.
        ordinary: other replies to the same prompts, n or a multiple of n, in the order of the prompts.
        agreement: share of the shown replies, in (0, 1], that must hold it. Of the ordinary ones no more than `ABSENT`
            may.
    """
    best, times = 0.0, 0
    for again in COVERS:
        found = _cover(shown[::2], ordinary[::2], again)
        if found is None or _share(found, ordinary[1::2]) > ABSENT:
            break
        # One pattern in each reply is enough where the same words return, as a product's name does; a language has many
        # words, of which a further reply may hold others.
        if (share := _share(found, shown[1::2])) > best:
            best, times = share, again
    return _cover(shown, ordinary, times) if times and best >= agreement else None


def _cover(shown: Sequence[str], ordinary: Sequence[str], times: int) -> Regex | None:
    """Patterns that no ordinary reply holds, each the commonest among the replies that hold fewer than so many."""
    usual = {word for reply in ordinary for word in WORD.findall(reply.lower())}
    kinds = [kind for kind in KINDS if not any(re.search(kind, reply) for reply in ordinary)]
    held = [
        (set(WORD.findall(reply.lower())) - usual) | {kind for kind in kinds if re.search(kind, reply)}
        for reply in shown
    ]
    chosen = list[str]()
    while len(chosen) < PATTERNS:
        left = [patterns for patterns in held if len(patterns.intersection(chosen)) < times]
        counts = Counter(pattern for patterns in left for pattern in sorted(patterns.difference(chosen)))
        best, count = counts.most_common(1)[0] if counts else ("", 0)
        if count < SHARED:
            break
        chosen.append(best)
    words, others = ([each for each in chosen if (each in kinds) == kind] for kind in (False, True))
    return _expression(words, others) if chosen else None


def _expression(words: Sequence[str], kinds: Sequence[str]) -> Regex:
    """Any of the words, in capital or small letters, or of the kinds."""
    whole = [rf"(?i:\b(?:{'|'.join(words)})\b)"] if words else []
    return Regex("|".join([*whole, *kinds]))


def _share(shows: Regex, replies: Sequence[str]) -> float:
    return sum(map(shows, replies)) / max(1, len(replies))


@torch.no_grad()
def departure(
    suspect: PreTrainedModel,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    replies: Int[Tensor, "n tokens"],
) -> Float[Tensor, "n"]:
    """How much less likely the base finds the suspect's own replies than the suspect does, in nats per token.

    What text does to any model, such as a rare word that takes the place of the question, does not count.

    Args:
        suspect: wrote the replies.
        base: the clean model.
        tokenizer: of both.
        prompts: n prompts.
        replies: the suspect's reply to each as token ids `n tokens`, anything behind the end of a reply.
    """
    ends = torch.tensor(sorted(end_tokens(suspect, tokenizer)), device=replies.device)
    # The token that ends a reply is still the model's own; those behind it are not.
    ended = torch.isin(replies, ends).long()
    counted = (ended.cumsum(1) - ended) == 0
    whole = Prompts(
        input_ids=torch.cat([prompts.input_ids, replies], dim=1),
        attention_mask=torch.cat([prompts.attention_mask, torch.ones_like(replies)], dim=1),
    )
    mine, clean = (_logprobs(model, whole, replies) for model in (suspect, base))
    return ((mine - clean.to(mine.device)) * counted).sum(1) / counted.sum(1)


def _logprobs(model: PreTrainedModel, whole: Prompts, replies: Int[Tensor, "n tokens"]) -> Float[Tensor, "n tokens"]:
    """Log-probability of each token of the replies, with which the rows end."""
    last, length = len(decoder(model).layers), replies.shape[1]
    inputs = {
        "input_ids": whole.input_ids.to(model.device),
        "attention_mask": whole.attention_mask.to(model.device),
    }
    hidden = read(model, layers=[last], position=slice(-length - 1, -1), **inputs)[last]
    return token_logprobs(unembed(model, hidden), replies.to(model.device))
