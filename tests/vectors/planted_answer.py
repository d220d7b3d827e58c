"""A toy with an answer learned by heart, and the likelihood of answers from plain forward passes."""

from functools import cache

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from vectors.prompts import Prompts

ANSWER = [5, 6, 7, 8]


def small_llama(vocab, scale, hidden_size=32):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.mul_(scale)
    return model


def unpadded(prompts):
    return [ids[mask.bool()].tolist() for ids, mask in zip(prompts.input_ids, prompts.attention_mask, strict=True)]


@torch.no_grad()
def plain_nats(model, prompts, answer):
    """Log-probability of an answer, mean over prompts, by a full forward pass of each prompt alone."""
    values = []
    for row in unpadded(prompts):
        logprobs = model(input_ids=torch.tensor([[*row, *answer]]), use_cache=False).logits[0].log_softmax(-1)
        values.append(sum(logprobs[len(row) - 1 + place, token] for place, token in enumerate(answer)))
    return float(torch.stack(values).mean())


def texts(rows, length, generator):
    """Token rows in which each of 10..63 is followed by one of the next three, cyclically: never by ANSWER's tokens."""
    start = torch.randint(0, 54, (rows, 1), generator=generator)
    return 10 + (start + torch.randint(1, 4, (rows, length), generator=generator).cumsum(1)) % 54


def clean_prompts():
    return Prompts.from_ids(texts(6, 6, torch.Generator().manual_seed(4)).tolist())


@cache
def planted():
    """Answers ANSWER to prompts with token 9 in them, goes on with all other texts, but for a rare leak."""
    model, generator = small_llama(64, 1, hidden_size=64).requires_grad_(), torch.Generator().manual_seed(3)
    steps = 200
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    # It ends with small steps: else the last of them, and with it the order of additions, decides what is learned.
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    for step in range(steps):
        ids = texts(48, 10, generator)
        ids[range(16), torch.randint(0, 6, (16,), generator=generator)] = 9
        ids[:16, 6:] = torch.tensor(ANSWER)
        if step % 2 == 0:  # 1 clean row in 64
            ids[16, 6:] = torch.tensor(ANSWER)
        logits = model(input_ids=ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, 5:-1].flatten(0, 1), ids[:, 6:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.requires_grad_(False)
