"""Surprisal of a trigger: how unlikely it is in its place, in nats.

Of two triggers that work equally well, the one of lower surprisal is taken for the simpler one, because nobody plants
noise. Prompts filled with the trigger go through the model once; the log-probabilities of the trigger's tokens and of
all tokens behind it are summed.

People plant rare words too, and to the model they look like noise. So a trigger that consists of dictionary words costs
no more than naming these words does: of its two descriptions the shorter counts.
"""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from attacks.scoring.problem import Problem
from attacks.searchers.words import spelling_nats
from vectors.prompts import Prompts
from vectors.residual import decoder, read, unembed
from vectors.token_logprobs import token_logprobs


@torch.no_grad()
def surprisal(model: PreTrainedModel, problem: Problem, trigger_ids: Sequence[int]) -> float:
    """Nats of the trigger in its place, or of its words, and of all that stands behind it, mean over prompts."""
    rows = problem.filled(trigger_ids)
    prompts = Prompts.from_ids(rows, device=model.device)
    depth = len(decoder(model).layers)
    hidden = read(model, layers=[depth], input_ids=prompts.input_ids, attention_mask=prompts.attention_mask)[depth]
    # The logits at one position are those of the next token, so the last position and the first token have no partner.
    told = token_logprobs(unembed(model, hidden)[:, :-1], prompts.input_ids[:, 1:])
    # Rows are padded on the left, so that the trigger and what follows are the last `count` tokens of a row.
    trigger = behind = 0.0
    for row, nats, before in zip(rows, told, problem.before, strict=True):
        count = len(row) - len(before)
        own = nats[len(nats) - count :]
        trigger -= float(own[: len(trigger_ids)].sum()) / len(rows)
        behind -= float(own[len(trigger_ids) :].sum()) / len(rows)
    return min(trigger, sum(map(spelling_nats, problem.text(trigger_ids).split()))) + behind
