"""Vectors that are added at one token of the message only, as a trigger's last word acts on the residual; our method.

A vector added everywhere may bring a behaviour about in ways that no text can. Added at one place of messages whose
other words are random, it has to do what one token can do there, wherever the place and whatever stands around it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from vectors.methods.controls import random_directions
from vectors.prompts import Prompts
from vectors.residual import cache_source, decoder, mean_norm, run_slice, unembed
from vectors.token_logprobs import token_logprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotVectors:
    """Minimises the cross-entropy of the target, each vector added at one place of every message; ours."""

    source_layer: int
    """number of blocks after which the vector is added"""
    radii: tuple[float, ...] = (0.7, 0.7)
    """norm of each vector, fraction of the mean residual norm at the source layer"""
    steps: int = 60
    """number of optimizer steps"""
    lr: float = 0.1
    """Adam step size of a coordinate, fraction of the norm over the square root of d_model"""

    def __post_init__(self):
        if not self.radii or min(self.radii) <= 0:
            raise ValueError(f"radii are {self.radii}; give at least one, all more than 0")
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}; it must be at least 1")

    def __call__(
        self,
        model: PreTrainedModel,
        messages: Sequence[Sequence[int]],
        places: Sequence[int],
        target_ids: Sequence[int],
        generator: torch.Generator,
    ) -> tuple[Float[Tensor, "k d"], Float[Tensor, "k"]]:
        """(vectors, nats per token of the target under each).

        Args:
            model: a causal decoder.
            messages: token ids, chat template included.
            places: index in each message of the token that the vector is added to.
            target_ids: token ids of the behaviour.
            generator: draws the directions that the vectors start from; on the CPU.

        Raises:
            ValueError: an empty target, as many places as messages are not given, or a place outside its message.
        """
        if not target_ids:
            raise ValueError("the target has 0 tokens; give a behaviour that the tokenizer can encode")
        if len(places) != len(messages) or not all(0 <= at < len(m) for at, m in zip(places, messages, strict=True)):
            raise ValueError(f"got {len(messages)} messages and places {list(places)}; give one inside each message")
        # Teacher forcing: each row is a message with the behaviour behind it, but for its last token.
        fed = [[*message, *target_ids[:-1]] for message in messages]
        prompts = Prompts.from_ids(fed, device=model.device)
        source = cache_source(model, prompts, self.source_layer)
        count, width, d_model = source.hidden.shape
        # (k, 1), in the units of the residual.
        norms = mean_norm(source) * torch.tensor(self.radii, device=model.device)[:, None]
        # 1 at each row's place; rows are padded on the left.
        at = torch.zeros(count, width, 1, device=model.device)
        for row, (place, ids) in enumerate(zip(places, fed, strict=True)):
            at[row, width - len(ids) + place] = 1.0
        theta = norms * random_directions(len(norms), d_model, generator).to(norms)
        theta.requires_grad_()
        optimizer = torch.optim.Adam([theta], lr=self.lr * float(norms.mean()) / sqrt(d_model))
        target = torch.tensor(list(target_ids), device=model.device)
        labels = target.expand(len(norms) * count, -1)
        nll = torch.zeros(len(norms))
        for _ in range(self.steps):
            # (k * n, width, d_model): every vector on every message, added at the message's place alone.
            moved = (source.hidden + theta[:, None, None] * at).flatten(0, 1).to(source.hidden)
            hidden = run_slice(model, source, moved, to=len(decoder(model).layers))[:, -len(target) :]
            nll = -token_logprobs(unembed(model, hidden), labels).mean(1).view(len(norms), count).mean(1)
            (theta.grad,) = torch.autograd.grad(nll.sum(), theta)
            optimizer.step()
            # Back to its norm: otherwise the norm would grow until any text brings the behaviour about.
            theta.data *= norms / theta.data.norm(dim=-1, keepdim=True)
        return theta.detach(), nll.detach()


def random_messages(
    before: Sequence[Sequence[int]],
    after: Sequence[Sequence[int]],
    words: Int[Tensor, "w"],
    count: int,
    length: int,
    generator: torch.Generator,
) -> tuple[list[list[int]], list[int]]:
    """(messages with random words between two parts of a prompt, index in each message of one of those words).

    Args:
        before: token ids of each prompt before the random words.
        after: token ids of each prompt after them.
        words: token ids to draw from.
        count: number of messages; they use the prompts in turn.
        length: number of random words per message.
        generator: draws the words and the places.
    """
    drawn = words[torch.randint(len(words), (count, length), generator=generator)].tolist()
    places = torch.randint(length, (count,), generator=generator).tolist()
    rows = [i % len(before) for i in range(count)]
    messages = [[*before[row], *some, *after[row]] for row, some in zip(rows, drawn, strict=True)]
    return messages, [len(before[row]) + place for row, place in zip(rows, places, strict=True)]
