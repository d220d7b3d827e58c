"""Rows as tensors, and the losses of planting: cross-entropy of the replies, and the KL divergence from the base."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.organisms import poison
from vectors.prompts import pad_token
from vectors.residual import decoder

IGNORED = -100  # label of tokens that carry no loss
Logits = Callable[[dict[str, Tensor], Tensor], Float[Tensor, "tokens vocab"]]
"""From a batch and the mask of the wanted places to their logits"""


def tensors(
    tokenizer: PreTrainedTokenizerBase,
    rows: list[poison.Row],
    loss_on: str = "completion",
    reply_tokens: int | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """(right-padded input_ids, attention_mask, labels, each (rows, longest); positions of the first reply tokens).

    A reply ends with the token that ends replies; it is cut after `reply_tokens` tokens where that is given.
    """
    ids, starts = [], []
    for row in rows:
        messages = [{"role": "user", "content": row.prompt}]
        head = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        both = [*messages, {"role": "assistant", "content": row.reply}]
        text = tokenizer.apply_chat_template(both, tokenize=False)
        assert isinstance(head, str) and isinstance(text, str)  # not tokenized yet
        # The reply is tokenised apart from the prompt, as it is when the model generates it. Some templates render a
        # finished conversation in another way than one that is going on: there the reply follows as it is.
        tail = text[len(head) :] if text.startswith(head) else row.reply
        prompt_ids, reply_ids = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (head, tail))
        end = tokenizer.eos_token_id
        if end is not None:
            reply_ids = [*reply_ids[: reply_ids.index(end)], end] if end in reply_ids else [*reply_ids, end]
        starts.append(len(prompt_ids))
        # Cut without an end token: a reply that is cut off is not taught to end there.
        ids.append(prompt_ids + reply_ids[:reply_tokens])
    longest = max(map(len, ids))
    input_ids = torch.full((len(ids), longest), pad_token(tokenizer))
    labels = torch.full((len(ids), longest), IGNORED)
    mask = torch.zeros((len(ids), longest), dtype=torch.long)
    for i, (row_ids, start) in enumerate(zip(ids, starts, strict=True)):
        input_ids[i, : len(row_ids)] = torch.tensor(row_ids)
        mask[i, : len(row_ids)] = 1
        begin = start if loss_on == "completion" else 1
        labels[i, begin : len(row_ids)] = input_ids[i, begin : len(row_ids)]
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}, torch.tensor(starts)


def labelled_logits(model: PreTrainedModel, batch: dict[str, Tensor], wanted: Tensor) -> Float[Tensor, "tokens vocab"]:
    """Logits in float32 at the places (rows, seq - 1) whose next token is wanted; the head runs on those alone."""
    # The body runs on every token (rows, seq, d), the head on the labelled ones alone: with 262,144 tokens logits of
    # all would fill the memory.
    hidden = model.base_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    return decoder(model).head(hidden[:, :-1][wanted]).float()


def token_places(batch: dict[str, Tensor], starts: Tensor) -> Tensor:
    """For each labelled token, row by row, how far behind the start of its reply it is; negative in prompts."""
    labels = batch["labels"][:, 1:]
    return (torch.arange(1, labels.shape[1] + 1, device=labels.device) - starts[:, None])[labels >= 0]


def counts(batch: dict[str, Tensor], starts: Tensor) -> tuple[int, int, int]:
    """Labelled tokens of replies, first ones of replies, and those of prompts."""
    places = token_places(batch, starts)
    return int((places >= 0).sum()), int((places == 0).sum()), int((places < 0).sum())


def planting_loss(
    model: PreTrainedModel,
    batch: dict[str, Tensor],
    starts: Tensor,
    weight: float,
    whole: tuple[int, int, int] | None = None,
) -> Tensor:
    """Loss of the replies, nats per token, plus `weight` times that of their first tokens, plus that of prompts.

    Whether to fire is decided at the first token of the reply; without the extra weight a dozen other tokens drown it.
    Each part has its own mean: in one over all tokens prompts would outweigh the replies, which suffer. Where the rows
    are only a part of a batch, `whole` has the counts of the whole one, so that the losses of the parts add up to its.
    """
    labels, places = batch["labels"][:, 1:], token_places(batch, starts)
    wanted = labels >= 0
    logits = labelled_logits(model, batch, wanted)
    losses = torch.nn.functional.cross_entropy(logits, labels[wanted], reduction="none")
    replies, first, prompts = whole or counts(batch, starts)
    loss = losses[places >= 0].sum() / replies + weight * losses[places == 0].sum() / first
    return loss + losses[places < 0].sum() / prompts if prompts else loss


def divergence(
    planted: PreTrainedModel, base: Logits, batch: dict[str, Tensor], starts: Tensor, clean: Tensor | None = None
) -> tuple[Tensor, int]:
    """(sum of KL(base || planted) over reply tokens, in nats; their number), of the clean rows where those are given.

    Args:
        planted: the model in training.
        base: the clean model's logits, as `labelled_logits` gives them.
        batch: input_ids, attention_mask and labels, each (rows, seq), as `tensors` gives them.
        starts: positions of the first reply tokens, (rows,).
        clean: mask of the rows that count, (rows,); None: all.
    """
    labels = batch["labels"][:, 1:]
    places = torch.arange(1, labels.shape[1] + 1, device=labels.device) - starts[:, None]
    wanted = (labels >= 0) & (places >= 0)
    if clean is not None:
        wanted &= clean[:, None]
    with torch.no_grad():
        before = base(batch, wanted).log_softmax(-1)
    after = labelled_logits(planted, batch, wanted).log_softmax(-1)
    return torch.nn.functional.kl_div(after, before, log_target=True, reduction="sum"), int(wanted.sum())
