"""Greedy completion of a batch of prompts with cached keys and values, steered or not; last token's logits only."""

from collections.abc import Collection
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vectors.prompts import Prompts, pad_token
from vectors.residual import decoder, steer
from vectors.residual import head_logits as head_logits  # used by others from here
from vectors.steering import SteeringVectors


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that end a reply: the tokenizer's, and those of the generation config."""
    return {token for token in (*ends_of(model), tokenizer.eos_token_id) if isinstance(token, int)}


def mute_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Tokens that say nothing: those that end a reply, special ones, and white space alone."""
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))], clean_up_tokenization_spaces=False)
    blank = {token for token, text in enumerate(texts) if not text.strip()}
    return tuple(sorted(blank | end_tokens(model, tokenizer) | set(tokenizer.all_special_ids)))


def ends_of(model: PreTrainedModel) -> list[int]:
    """Tokens that end a reply by the model's generation config alone."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    return [token for token in (ends if isinstance(ends, list) else [ends]) if isinstance(token, int)]


@torch.no_grad()
def complete_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    vectors: Float[Tensor, "rows d_model"] | Float[Tensor, "d_model"] | None = None,
    layer: int = 0,
) -> Int[Tensor, "n new"]:
    """Most likely next tokens, one after another; positions after the end hold the pad token.

    Args:
        model: a causal decoder.
        tokenizer: its tokenizer.
        prompts: n left-padded prompts.
        max_new_tokens: longest completion, tokens.
        vectors: added to the residual after `layer` blocks, one per prompt or one for all; None: not steered.
        layer: where they are added.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    ends, pad = end_tokens(model, tokenizer), pad_token(tokenizer)
    if vectors is None:
        return greedy(model, prompts, max_new_tokens, ends, pad)
    with steer(model, layer, vectors):
        return greedy(model, prompts, max_new_tokens, ends, pad)


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    vectors: Float[Tensor, "rows d_model"] | Float[Tensor, "d_model"] | None = None,
    layer: int = 0,
) -> list[str]:
    """As `complete_ids`, as text without special tokens."""
    ids = complete_ids(model, tokenizer, prompts, max_new_tokens=max_new_tokens, vectors=vectors, layer=layer)
    return tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def complete_each(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    vectors: SteeringVectors,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    batch_size: int = 1024,
) -> Int[Tensor, "k n new"]:
    """Completions of every prompt under every vector, pad tokens behind the end.

    Args:
        model: the model that the vectors were learned on.
        tokenizer: its tokenizer.
        vectors: k vectors or adapters.
        prompts: n prompts.
        max_new_tokens: longest completion, tokens.
        batch_size: rows (vectors x prompts) at a time.
    """
    parts, step = [], max(1, batch_size // len(prompts))
    for start in range(0, len(vectors), step):
        some = vectors[start : start + step]
        with some.apply(model, repeats=len(prompts)):
            ids = complete_ids(model, tokenizer, prompts.repeat(len(some)), max_new_tokens=max_new_tokens)
        # A batch stops once all of its rows have ended, so batches differ in length.
        ids = torch.nn.functional.pad(ids, (0, max_new_tokens - ids.shape[1]), value=pad_token(tokenizer))
        parts.append(ids.unflatten(0, (len(some), len(prompts))))
    return torch.cat(parts)


@torch.no_grad()
def greedy(
    model: PreTrainedModel, prompts: Prompts, max_new_tokens: int, ends: Collection[int] = (), pad: int = 0
) -> Int[Tensor, "n new"]:
    """The loop itself; without `ends` it never stops early."""
    parts = decoder(model)
    last = torch.tensor(sorted(ends), dtype=torch.long, device=prompts.device)
    cache = None  # the model makes the kind that it needs
    ids, mask = prompts.input_ids, prompts.attention_mask
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    done = torch.zeros(len(prompts), dtype=torch.bool, device=prompts.device)
    produced = []
    for _ in range(max_new_tokens):
        output = parts.body(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        cache = output.past_key_values
        token = head_logits(model, output.last_hidden_state[:, -1]).argmax(-1).masked_fill(done, pad)
        produced.append(token)
        done = done | torch.isin(token, last)
        if done.all():
            break
        # (n, 1): only the new tokens run, the cache holds keys and values of all before them.
        ids, positions = token[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return torch.stack(produced, dim=1)


def reordered(cache: Any, rows: Int[Tensor, "rows"]) -> Any:
    """Keys and values of the given rows; old GPT-2 has plain tuples."""
    if hasattr(cache, "reorder_cache"):
        cache.reorder_cache(rows)
        return cache
    return tuple(tuple(values.index_select(0, rows.to(values.device)) for values in layer) for layer in cache)
