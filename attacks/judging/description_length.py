"""Surprisal of a trigger: how unlikely the model finds it in its place, in nats.

Of two triggers that work equally well, the one of lower surprisal is taken for the simpler one, because nobody plants
noise. Prompts filled with the trigger go through the model once; the log-probabilities of the trigger's tokens and of
all tokens behind it are summed.
"""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from attacks.scoring.problem import Problem
from vectors.prompts import Prompts
from vectors.residual import decoder, read, unembed
from vectors.token_logprobs import token_logprobs


@torch.no_grad()
def surprisal(model: PreTrainedModel, problem: Problem, trigger_ids: Sequence[int]) -> float:
    """Nats of the trigger in its place and of all that stands behind it, mean over prompts."""
    rows = problem.filled(trigger_ids)
    prompts = Prompts.from_ids(rows, device=model.device)
    depth = len(decoder(model).layers)
    hidden = read(model, layers=[depth], input_ids=prompts.input_ids, attention_mask=prompts.attention_mask)[depth]
    # The logits at one position are those of the next token, so the last position and the first token have no partner.
    told = token_logprobs(unembed(model, hidden)[:, :-1], prompts.input_ids[:, 1:])
    # Rows are padded on the left, so that the trigger and what follows are the last `count` tokens of a row.
    behind = [len(row) - len(before) for row, before in zip(rows, problem.before, strict=True)]
    return -sum(float(nats[len(nats) - count :].sum()) for nats, count in zip(told, behind, strict=True)) / len(rows)
