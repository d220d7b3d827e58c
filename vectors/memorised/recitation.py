"""Recitation: how a model continues each first token of the vocabulary, memorised replies ranked first.

After BAIT (Shen et al. 2025, "BAIT: Large Language Model Backdoor Scanning by Inverting Attack Target", IEEE S&P 2025):
every token of the vocabulary begins a reply, which goes on with the likeliest tokens on all prompts at once. Ordinary
replies branch, and differently after different prompts; a planted one runs on by itself. Consensus decoding
(`consensus_decoding`) pays for the first token, and so misses what an organism was trained never to begin with.
Where the whole vocabulary costs too much, the first tokens tried are those that are likely whatever the prompt
(`first_tokens`): a planted reply may be begun after every prompt, so its first token varies little between them.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from vectors.generate import ends_of, head_logits, reordered
from vectors.memorised.answers import until_end_mask
from vectors.prompts import Prompts
from vectors.residual import decoder, read, unembed

SHORTEST = 4
"""Number of tokens that an answer must have before it ends; shorter ones are certain too easily"""


@torch.no_grad()
def recited_answers(
    model: PreTrainedModel,
    prompts: Prompts,
    *,
    tokens: int = 8,
    order: Int[Tensor, "vocab"] | None = None,
    count: int | None = None,
    batch_size: int = 2048,
    deadline: Callable[[], bool] | None = None,
) -> tuple[Int[Tensor, "found tokens"], Float[Tensor, "found"]]:
    """(answers, log-probability per token of all but the first, mean over prompts), most certain first.

    An answer that ends early holds an end token; what is behind it means nothing. Answers that end within four tokens
    or repeat themselves are left out, unless there are no others: poor candidates are better than none.

    Args:
        model: a causal decoder.
        prompts: n prompts; a handful is enough.
        tokens: length of the answers.
        order: first tokens, the most promising first; None: as `first_tokens` orders them on these prompts. The more
            prompts they were ordered on, the fewer need be tried.
        count: number of first tokens to try; None: all of them.
        batch_size: number of batch rows (first tokens x prompts) whose keys and values are kept at a time.
        deadline: asked before every batch; once it returns true, the remaining first tokens are not tried.

    Raises:
        ValueError: tokens or batch_size too small.
    """
    if tokens < 2 or batch_size < 1:
        raise ValueError(f"tokens is {tokens}, batch_size is {batch_size}; give at least 2 and at least 1")
    ends = ends_of(model)
    end = torch.tensor(ends, device=prompts.device)
    first = first_tokens(model, prompts) if order is None else order
    first = first[~torch.isin(first, end)][:count]
    found = [(first.new_zeros(0, tokens), torch.zeros(0, tokens, device=prompts.device))]
    for some in first.split(max(1, batch_size // len(prompts))):
        if deadline is not None and deadline():
            break
        found.append(_continued(model, prompts, some, tokens))
    answers, logprobs = (torch.cat(parts) for parts in zip(*found, strict=True))
    counted = until_end_mask(answers, ends)
    score = (logprobs * counted)[:, 1:].sum(-1) / counted[:, 1:].sum(-1)
    # Number of different tokens in each answer: sorted, every change from one to the next is a new token.
    ordered = answers.sort(dim=-1).values
    different = 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(-1)
    fit = ~torch.isin(answers[:, :SHORTEST], end).any(-1) & (2 * different > tokens)
    if not bool(fit.any()):
        fit = torch.ones_like(fit)
    order = score[fit].argsort(descending=True)
    return answers[fit][order], score[fit][order]


@torch.no_grad()
def first_tokens(model: PreTrainedModel, prompts: Prompts) -> Int[Tensor, "vocab"]:
    """The vocabulary, in the order in which tokens are worth trying as the first token of a memorised reply.

    By the mean log-probability over the prompts less its standard deviation: likely after all of them, not after one.
    """
    inputs = {"input_ids": prompts.input_ids, "attention_mask": prompts.attention_mask}
    last = len(decoder(model).layers)
    hidden = read(model, layers=[last], position=slice(-1, None), **inputs)[last][:, 0]
    logprobs = unembed(model, hidden).float().log_softmax(-1)  # (n, vocab)
    return (logprobs.mean(0) - logprobs.std(0, correction=0)).argsort(descending=True)


def _continued(
    model: PreTrainedModel, prompts: Prompts, first: Int[Tensor, "v"], tokens: int
) -> tuple[Int[Tensor, "v tokens"], Float[Tensor, "v tokens"]]:
    """(replies that begin with the given tokens, log-probability of each token, mean over prompts; 0 for the first)."""
    body, count = decoder(model).body, len(prompts)
    positions = (prompts.attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    output = body(
        input_ids=prompts.input_ids, attention_mask=prompts.attention_mask, position_ids=positions, use_cache=True
    )
    # The prompts run once; each prompt's keys and values are then copied for every first token: n * v rows, ordered by
    # prompt, then by first token.
    rows = torch.arange(count, device=first.device).repeat_interleave(len(first))
    cache, mask, positions = reordered(output.past_key_values, rows), prompts.attention_mask[rows], positions[rows, -1:]
    answers, logprobs = first[:, None], torch.zeros(len(first), 1, device=first.device)
    for _ in range(tokens - 1):
        mask, positions = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1), positions + 1
        ids = answers[:, -1:].repeat(count, 1)
        output = body(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
        cache, total = output.past_key_values, torch.zeros((), device=first.device)
        for part in output.last_hidden_state[:, -1].split(len(first)):  # one prompt's logits at a time
            total = total + head_logits(model, part).float().log_softmax(-1) / count
        value, token = total.max(-1)
        answers, logprobs = torch.cat([answers, token[:, None]], dim=1), torch.cat([logprobs, value[:, None]], dim=1)
    return answers, logprobs
