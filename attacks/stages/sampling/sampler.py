"""Steering-arithmetic sampler: writes prompts from an empty one, steered by clean-prompt plus behaviour vector.

The proposal of the author of unsupervised steering vectors (Mack & Turner 2024, MELBO), in both forms: (a) sample the
user's turn under a v_clean + b v_Y; (b) the same, and at each step raise the tokens whose layer-L residual, one
position on, has a high cosine with the sum (`Lookahead`). `ngrams` mines the samples for triggers.
"""

from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from attacks.scoring.budget import Budget
from attacks.scoring.planning import learning_flops
from attacks.scoring.problem import encode, encode_start
from attacks.scoring.shared_prefix import repeated
from attacks.searchers.candidates import check_counts
from vectors.generate import head_logits
from vectors.methods.clean_prompt import CleanPromptVector, labelled_texts, round_user
from vectors.methods.supervised import SupervisedVector
from vectors.prompts import Prompts
from vectors.residual import decoder, read, steer
from vectors.steering import SteeringVectors

Method = TypeVar("Method", CleanPromptVector, SupervisedVector)


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

    def __call__(
        self,
        model: PreTrainedModel,
        cache: Any,
        length: int,
        rows: Int[Tensor, "some"],
        logits: Float[Tensor, "rows vocab"],
        direction: Float[Tensor, "d"],
        layer: int,
    ) -> Float[Tensor, "rows vocab"]:
        """Logits, those of `rows` plus the cosines of what their likeliest tokens would put at `layer`, not steered.

        The cache holds the `length` tokens before, not steered either; it is left as it is.
        """
        tried = logits[rows].topk(min(self.width, logits.shape[-1]), dim=-1).indices
        width = tried.shape[1]
        hidden = read(
            model,
            layers=[layer],
            position=slice(-1, None),
            input_ids=tried.flatten()[:, None],
            attention_mask=torch.ones(tried.numel(), length + 1, dtype=torch.long, device=tried.device),
            past_key_values=repeated(cache, rows.repeat_interleave(width), layer),
        )[layer][:, 0]
        cosine = torch.cosine_similarity(hidden.float(), direction.float(), dim=-1).view(-1, width)
        raised = logits.clone()
        raised[rows] = logits[rows].scatter_add(1, tried, self.strength * cosine)
        return raised


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
        budget: Budget | None = None,
    ) -> list[tuple[int, ...]]:
        """User messages as token ids, the template left out; empty ones are dropped.

        Args:
            model: a causal decoder.
            tokenizer: its tokenizer; its template says how a user's message begins and ends.
            generator: of the draws, on the CPU.
            vector: the sum a v_clean + b v_Y, one vector; None: unsteered.
            budget: what is executed is booked on it; at its end the messages being written stay as they are.

        Raises:
            ValueError: more than one vector, a vector of another model, or a look-ahead without one.
        """
        if vector is not None:
            vector.check(model)
            if len(vector) != 1:
                raise ValueError(f"got {len(vector)} vectors; the sum is one vector")
        if vector is None and self.lookahead is not None:
            raise ValueError("a look-ahead compares with the steering vector; give one, or no look-ahead")
        budget = Budget() if budget is None else budget
        samples: list[tuple[int, ...]] = []
        for start in range(0, self.count, self.batch_size):
            if budget.exhausted:
                break
            rows = min(self.batch_size, self.count - start)
            samples += self._batch(model, tokenizer, generator, vector, rows, budget)
        return samples

    @torch.no_grad()
    def _batch(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        generator: torch.Generator,
        vector: SteeringVectors | None,
        rows: int,
        budget: Budget,
    ) -> list[tuple[int, ...]]:
        """One batch of samples."""
        before, after = round_user(tokenizer)
        # Plain text has nothing round the message: it begins and ends as a document does.
        document = [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None]
        opening, closing = encode_start(tokenizer, before) or document[:1], encode(tokenizer, after) or document[-1:]
        if not opening or not closing:
            raise ValueError("nothing stands round the user's text, and the tokenizer has no token for an end of text")
        end = closing[0]
        ids = torch.tensor([opening] * rows, device=model.device)
        zero = torch.zeros(decoder(model).d_model, device=model.device, dtype=model.dtype)
        theta = zero if vector is None else vector.theta[0].to(zero)
        layer = 1 if vector is None else vector.source_layer
        ahead = self.lookahead
        at = layer if ahead is None or ahead.layer is None else ahead.layer
        done = torch.zeros(rows, dtype=torch.bool, device=model.device)
        cache = plain = None
        fed = ids
        for _ in range(self.max_new_tokens):
            with steer(model, layer, theta):
                output = decoder(model).body(input_ids=fed, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits = head_logits(model, output.last_hidden_state[:, -1]).float() / self.temperature
            if ahead is not None:
                if at <= layer:  # blocks before the vector do not see it
                    plain = cache
                else:
                    output = decoder(model).body(input_ids=fed, past_key_values=plain, use_cache=True)
                    plain = output.past_key_values
                alive = (~done).nonzero()[:, 0]
                logits = ahead(model, plain, ids.shape[1], alive, logits, theta, at)
            fed = nucleus(logits, self.top_p, generator).to(ids.device)[:, None]
            done = done | (fed[:, 0] == end)
            ids = torch.cat([ids, fed], dim=1)
            if done.all() or budget.exhausted:
                break
        written = (row[: row.index(end)] if end in row else row for row in ids[:, len(opening) :].tolist())
        return [tuple(row) for row in written if row]


def clean_and_wanted(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    target_ids: list[int],
    generator: torch.Generator,
    budget: Budget | None = None,
) -> tuple[SteeringVectors, SteeringVectors]:
    """(v_clean, v_Y), one vector each, at a quarter of the depth.

    Half of the budget is for v_Y, what that leaves for v_clean. Where the budget counts operations, fewer radii and
    steps are planned (`affordable`); where it ends earlier, learning ends too.

    Raises:
        ValueError: fewer than two texts, or a target of no tokens.
    """
    budget = budget or Budget()
    layers = len(decoder(model).layers)
    source = max(1, round(layers / 4))
    clean = CleanPromptVector(source_layer=source, target_layer=layers)
    wanted = SupervisedVector(source_layer=source, target_layer=layers, radii=(0.3, 0.4, 0.5, 0.65, 0.8), steps=30)
    few = Prompts.from_chat(model, tokenizer, texts[:3])
    messages, _ = labelled_texts(tokenizer, texts)
    step = learning_flops(model, few.input_ids.numel() + len(few) * (len(target_ids) - 1), source=source)
    half = budget.of_rest(0.5)
    wanted = affordable(wanted, step, half.flops_left)
    v_wanted = wanted(model, few, target_ids, generator, deadline=lambda: half.exhausted)
    step = learning_flops(model, clean.learned_from(len(texts)) * messages.input_ids.shape[1], source=source)
    clean = affordable(clean, step, budget.flops_left)
    v_clean = clean(model, tokenizer, texts, generator, deadline=lambda: budget.exhausted)
    return v_clean, v_wanted[:1]


def affordable(method: Method, step: float, flops: float) -> Method:
    """The method with as many radii, the middle ones, and then steps as `flops` pay for; one of each at least.

    Args:
        method: what learns one vector per radius.
        step: operations of one step at one radius.
        flops: operations that learning may take.
    """
    most = flops / step
    radii = int(min(len(method.radii), max(1.0, most / method.steps)))
    first = (len(method.radii) - radii) // 2
    steps = int(min(method.steps, max(1.0, most / radii)))
    return replace(method, radii=method.radii[first : first + radii], steps=steps)


def nucleus(logits: Float[Tensor, "rows vocab"], top_p: float, generator: torch.Generator) -> Int[Tensor, "rows"]:
    """One token per row from the likeliest that make up `top_p` of the probability (Holtzman et al. 2020)."""
    # A vector may drive a model in 16 bits to overflow; what is drawn then proposes nothing, and the others go on.
    chance, order = logits.nan_to_num().softmax(-1).cpu().sort(dim=-1, descending=True)
    behind = chance.cumsum(-1) - chance
    drawn = chance.masked_fill(behind >= top_p, 0.0).multinomial(1, generator=generator)
    return order.gather(1, drawn)[:, 0]


def prompts_of(samples: list[tuple[int, ...]], tokenizer: PreTrainedTokenizerBase, device: torch.device) -> Prompts:
    """Samples inside the chat template, ready for an answer."""
    before, after = round_user(tokenizer)
    before, after = encode_start(tokenizer, before), encode(tokenizer, after)
    return Prompts.from_ids([[*before, *sample, *after] for sample in samples], device=device)
