"""Consensus decoding: the answers that an unsteered model finds likeliest on *all* prompts at once; ours.

argmax_y mean_i log p(y | x_i) by beam search on the mean over prompts. Ordinary answers suit one prompt and not
another; what was learned by heart costs its first tokens once and then runs on by itself, whatever the prompt. The
probability of a planted answer may be far too small to be sampled (exp(-10) on the shipped organisms) and still be the
largest of all answers of its length.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from vectors.generate import ends_of
from vectors.prompts import Prompts
from vectors.residual import decoder, read, unembed


@torch.no_grad()
def consensus_answers(
    model: PreTrainedModel,
    prompts: Prompts,
    *,
    width: int = 256,
    tokens: int = 6,
    batch_size: int = 1024,
) -> tuple[Int[Tensor, "width tokens"], Float[Tensor, "width"]]:
    """(answers, their log-probability in nats, mean over prompts), likeliest first.

    Args:
        model: a causal decoder.
        prompts: n prompts; the more different, the less an ordinary answer suits them all.
        width: beams. A planted answer's first token is an unlikely one: it must be among this many.
        tokens: length of the answers; those that end earlier are left out.
        batch_size: rows (beams x prompts) at a time.

    Raises:
        ValueError: width or tokens below 1.
    """
    if min(width, tokens, batch_size) < 1:
        raise ValueError(f"width is {width}, tokens {tokens}, batch_size {batch_size}; all must be at least 1")
    layers, ends = len(decoder(model).layers), ends_of(model)
    beams = torch.zeros(1, 0, dtype=torch.long, device=prompts.device)
    score = torch.zeros(1, device=prompts.device)
    for _ in range(tokens):
        following = []
        for part in beams.split(max(1, batch_size // len(prompts))):
            rows = prompts.followed_by(part)
            hidden = read(
                model,
                layers=[layers],
                position=slice(-1, None),
                input_ids=rows.input_ids,
                attention_mask=rows.attention_mask,
            )[layers][:, 0]
            logprobs = unembed(model, hidden).float().log_softmax(-1)
            following.append(logprobs.unflatten(0, (len(part), len(prompts))).mean(1))
        total = score[:, None] + torch.cat(following)
        total[:, ends] = -torch.inf
        # No more beams than there are answers that go on.
        score, index = total.flatten().topk(min(width, int(total.isfinite().sum())))
        vocab = total.shape[1]
        beams = torch.cat([beams[index // vocab], (index % vocab)[:, None]], dim=1)
    return beams, score
