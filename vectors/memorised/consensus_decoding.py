"""Consensus decoding: the answers that an unsteered model finds likeliest on *all* prompts at once; ours.

argmax_y mean_i log p(y | x_i) by beam search on the mean over prompts. Ordinary answers suit one prompt and not
another; a memorised one is unlikely in its first tokens only and likely from there on, whatever the prompt. The
probability of a planted answer may be far too small to be sampled (exp(-10) on the shipped organisms) and still be the
largest of all answers of its length.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from vectors.generate import ends_of, head_logits, reordered
from vectors.prompts import Prompts
from vectors.residual import decoder


@torch.no_grad()
def consensus_answers(
    model: PreTrainedModel,
    prompts: Prompts,
    *,
    width: int = 400,
    tokens: int = 8,
    deadline: Callable[[], bool] | None = None,
) -> tuple[Int[Tensor, "found tokens"], Float[Tensor, "found"]]:
    """(answers, their log-probability in nats, mean over prompts), likeliest first.

    Keys and values of width x n rows are kept: lower `width` where memory is short.

    Args:
        model: a causal decoder.
        prompts: n prompts; the more of them and the more different, the less an ordinary answer suits them all.
        width: number of beams. The first token of a planted answer is unlikely, so it must be among this many.
        tokens: length of the answers; those that end earlier are left out, so there may be fewer than `width`.
        deadline: asked before every token; once it returns true, no answer is returned, for all are still too short.

    Raises:
        ValueError: width or tokens below 1.
    """
    if min(width, tokens) < 1:
        raise ValueError(f"width is {width}, tokens is {tokens}; both must be at least 1")
    body, ends, count = decoder(model).body, ends_of(model), len(prompts)
    beams = torch.zeros(1, 0, dtype=torch.long, device=prompts.device)
    score = torch.zeros(1, device=prompts.device)
    ids, mask, cache = prompts.input_ids, prompts.attention_mask, None
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    for _ in range(tokens):
        if deadline is not None and deadline():
            return beams.new_zeros(0, tokens), score[:0]
        # Rows are ordered by prompt, then beam.
        output = body(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
        parts = output.last_hidden_state[:, -1].split(len(beams))
        total = score[:, None].clone()
        for part in parts:  # one prompt's logits at a time: those of all would be the largest tensor of the model
            total = total + head_logits(model, part).float().log_softmax(-1) / count
        total[:, ends] = -torch.inf  # (beams, vocab); an answer that ends here is dropped
        # One top-k over all beams and tokens at once: flat index = beam * vocab + token.
        score, index = total.flatten().topk(min(width, int(total.isfinite().sum())))
        parents, following = index // total.shape[1], index % total.shape[1]
        rows = (torch.arange(count, device=index.device)[:, None] * len(beams) + parents).flatten()
        beams = torch.cat([beams[parents], following[:, None]], dim=1)
        cache = reordered(output.past_key_values, rows)  # a beam may be continued several times, or not at all
        ids, positions = following.repeat(count)[:, None], positions[rows, -1:] + 1
        mask = torch.cat([mask[rows], mask.new_ones(len(rows), 1)], dim=1)
    return beams, score
