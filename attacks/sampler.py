"""Steering-arithmetic sampler: writes prompts from an empty one, steered by clean-prompt plus behaviour vector.

The proposal of the author of unsupervised steering vectors (Mack & Turner 2024, MELBO), in both forms: (a) sample the
user's turn under a v_clean + b v_Y; (b) the same, and at each step raise the tokens whose layer-L residual, one
position on, has a high cosine with the sum (`Lookahead`). `attacks.ngrams` mines the samples for triggers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from attacks.problem import encode
from attacks.triggers import check_counts
from vectors.clean_prompt import CleanPromptVector, round_user
from vectors.generate import head_logits, reordered
from vectors.prompts import Prompts
from vectors.residual import decoder, read, steer
from vectors.steering import SteeringVectors
from vectors.supervised import SupervisedVector


@dataclass(frozen=True, slots=True, kw_only=True)
class Lookahead:
    """Form (b): what a step's likeliest tokens would do to the residual stream."""

    width: int = 32
    """likeliest tokens that are tried; the others keep their logits"""
    strength: float = 20.0
    """logits per unit of cosine"""
    layer: int | None = None
    """residual that is compared with the sum, after this many blocks; None: where the vector is added"""

    def __post_init__(self):
        if self.width < 1:
            raise ValueError(f"width is {self.width}; it must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """Samples user messages; without a vector, from the model's own idea of them."""

    count: int = 256
    """samples"""
    max_new_tokens: int = 32
    """longest sample, tokens"""
    temperature: float = 1.0
    """of the logits"""
    top_p: float = 1.0
    """share of probability that is sampled from (nucleus)"""
    lookahead: Lookahead | None = None
    """None: form (a)"""
    batch_size: int = 128
    """samples at a time"""

    def __post_init__(self):
        check_counts(self, "count", "max_new_tokens", "batch_size")
        if self.temperature <= 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"temperature is {self.temperature}, top_p is {self.top_p}; give more than 0, and (0, 1]")

    def __call__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        generator: torch.Generator,
        vector: SteeringVectors | None = None,
        *,
        stop: Callable[[], bool] = lambda: False,
    ) -> list[tuple[int, ...]]:
        """User messages as token ids, the template left out; empty ones are dropped.

        Args:
            model: a causal decoder.
            tokenizer: its tokenizer; its template says how a user's message begins and ends.
            generator: of the draws, on the CPU.
            vector: the sum a v_clean + b v_Y, one vector; None: unsteered.
            stop: ends between batches once it returns true.

        Raises:
            ValueError: more than one vector, a vector of another model, or a look-ahead without one.
        """
        if vector is not None:
            vector.check(model)
            if len(vector) != 1:
                raise ValueError(f"got {len(vector)} vectors; the sum is one vector")
        if vector is None and self.lookahead is not None:
            raise ValueError("a look-ahead compares with the steering vector; give one, or no look-ahead")
        samples: list[tuple[int, ...]] = []
        for start in range(0, self.count, self.batch_size):
            if stop():
                break
            rows = min(self.batch_size, self.count - start)
            samples += self._batch(model, tokenizer, generator, vector, rows)
        return samples

    @torch.no_grad()
    def _batch(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        generator: torch.Generator,
        vector: SteeringVectors | None,
        rows: int,
    ) -> list[tuple[int, ...]]:
        """One batch of samples."""
        before, after = round_user(tokenizer)
        end, opening = encode(tokenizer, after)[0], encode(tokenizer, before)
        ids = torch.tensor([opening] * rows, device=model.device)
        zero = torch.zeros(decoder(model).d_model, device=model.device, dtype=model.dtype)
        theta = zero if vector is None else vector.theta[0].to(zero)
        layer = 1 if vector is None else vector.source_layer
        done = torch.zeros(rows, dtype=torch.bool, device=model.device)
        cache, fed = None, ids
        for _ in range(self.max_new_tokens):
            with steer(model, layer, theta):
                output = decoder(model).body(input_ids=fed, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits = head_logits(model, output.last_hidden_state[:, -1]).float() / self.temperature
            if self.lookahead is not None and vector is not None:
                at = layer if self.lookahead.layer is None else self.lookahead.layer
                logits = self._raised(model, ids, logits, theta, at)
            fed = nucleus(logits, self.top_p, generator).to(ids.device)[:, None]
            done = done | (fed[:, 0] == end)
            ids = torch.cat([ids, fed], dim=1)
            if done.all():
                break
        written = (row[: row.index(end)] if end in row else row for row in ids[:, len(opening) :].tolist())
        return [tuple(row) for row in written if row]

    def _raised(
        self,
        model: PreTrainedModel,
        ids: Int[Tensor, "rows seq"],
        logits: Float[Tensor, "rows vocab"],
        direction: Float[Tensor, "d"],
        layer: int,
    ) -> Float[Tensor, "rows vocab"]:
        """Logits plus the cosines of what the likeliest tokens would put at `layer`, the model unsteered."""
        assert self.lookahead is not None
        width = min(self.lookahead.width, logits.shape[-1])
        tried = logits.topk(width, dim=-1).indices
        cache: Any = decoder(model).body(input_ids=ids, use_cache=True).past_key_values
        cache = reordered(cache, torch.arange(len(ids), device=ids.device).repeat_interleave(width))
        mask = torch.ones(len(ids) * width, ids.shape[1] + 1, dtype=torch.long, device=ids.device)
        hidden = read(
            model,
            layers=[layer],
            position=slice(-1, None),
            input_ids=tried.flatten()[:, None],
            attention_mask=mask,
            past_key_values=cache,
        )[layer][:, 0]
        cosine = torch.cosine_similarity(hidden.float(), direction.float(), dim=-1).view(len(ids), width)
        return logits.scatter_add(1, tried, self.lookahead.strength * cosine)


def clean_and_wanted(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    target_ids: list[int],
    generator: torch.Generator,
) -> tuple[SteeringVectors, SteeringVectors, int]:
    """(v_clean, v_Y, tokens that ran through the layers to learn them); one vector each, at a quarter of the depth.

    Raises:
        ValueError: fewer than two texts, or a target of no tokens.
    """
    layers = len(decoder(model).layers)
    source = max(1, round(layers / 4))
    clean = CleanPromptVector(source_layer=source, target_layer=layers)
    wanted = SupervisedVector(source_layer=source, target_layer=layers, radii=(0.3, 0.4, 0.5, 0.65, 0.8), steps=30)
    all_of_them, few = (Prompts.from_chat(model, tokenizer, some) for some in (texts, texts[:3]))
    tokens = len(clean.radii) * clean.steps * all_of_them.input_ids.numel()
    tokens += len(wanted.radii) * wanted.steps * (few.input_ids.numel() + len(few) * len(target_ids))
    return clean(model, tokenizer, texts, generator), wanted(model, few, target_ids, generator)[:1], tokens


def nucleus(logits: Float[Tensor, "rows vocab"], top_p: float, generator: torch.Generator) -> Int[Tensor, "rows"]:
    """One token per row from the likeliest that make up `top_p` of the probability (Holtzman et al. 2020)."""
    chance, order = logits.softmax(-1).cpu().sort(dim=-1, descending=True)
    behind = chance.cumsum(-1) - chance
    drawn = chance.masked_fill(behind >= top_p, 0.0).multinomial(1, generator=generator)
    return order.gather(1, drawn)[:, 0]


def prompts_of(samples: list[tuple[int, ...]], tokenizer: PreTrainedTokenizerBase, device: torch.device) -> Prompts:
    """Samples inside the chat template, ready for an answer."""
    before, after = (encode(tokenizer, part) for part in round_user(tokenizer))
    return Prompts.from_ids([[*before, *sample, *after] for sample in samples], device=device)
