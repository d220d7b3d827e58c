"""What a good trigger does: target likelihood, the effect of a steering vector, the steered model's output.

Each objective is a callable on candidates, differentiable through one-hot rows, lower is better. Effects are changes of
the residual stream at the last prompt token against the same prompt with an empty slot.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from attacks.engine import Engine, Objective
from vectors.prompts import Prompts
from vectors.residual import read, steer, unembed
from vectors.steering import SteeringVectors


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetNLL:
    """Mean negative log-likelihood of the target, nats per token (GCG, Zou et al. 2023, eq. 3)."""

    target_ids: Sequence[int]
    """the behaviour as tokens"""

    def __call__(self, engine: Engine, candidates: Tensor) -> Float[Tensor, "c"]:
        logprobs = engine.target_logits(candidates, self.target_ids).float().log_softmax(-1)
        target = torch.tensor(list(self.target_ids), device=logprobs.device)
        chosen = logprobs.gather(-1, target.expand(logprobs.shape[:-1])[..., None])
        return -chosen.mean(dim=(1, 2, 3))


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaCosine:
    """Negative cosine between the candidate's effect and the wanted effect, in [-1, 1]."""

    delta: dict[int, Float[Tensor, "n d_model"]]
    """per layer, the wanted change"""
    clean: dict[int, Float[Tensor, "n d_model"]]
    """per layer, the residual with an empty slot"""
    weights: dict[int, float] = field(default_factory=dict)
    """per layer; 1 where none is given"""

    def __call__(self, engine: Engine, candidates: Tensor) -> Float[Tensor, "c"]:
        layers = list(self.delta)
        hidden = engine.residuals(candidates, layers)
        weights = {layer: self.weights.get(layer, 1.0) for layer in layers}
        losses = [
            -weights[layer]
            * torch.cosine_similarity(hidden[layer].float() - self.clean[layer], self.delta[layer], dim=-1).mean(1)
            for layer in layers
        ]
        return torch.stack(losses).sum(0) / sum(weights.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class SteeredKL:
    """KL(steered || candidate) of the next-token distribution read at `layer`, nats; needs no behaviour text."""

    steered_logprobs: Float[Tensor, "n vocab"]
    """of the steered model on the prompts with an empty slot"""
    layer: int
    """blocks before the read-out; the number of layers is the true output"""

    def __call__(self, engine: Engine, candidates: Tensor) -> Float[Tensor, "c"]:
        logprobs = engine.logits(candidates, self.layer).float().log_softmax(-1)
        gap = self.steered_logprobs.exp() * (self.steered_logprobs - logprobs)
        return gap.sum(-1).mean(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hybrid:
    """Weighted sum of two objectives."""

    a: Objective
    b: Objective
    weight: float = 0.5
    """of `b`, in [0, 1]"""

    def __post_init__(self):
        if not 0 <= self.weight <= 1:
            raise ValueError(f"weight is {self.weight}; it must lie in [0, 1]")

    def __call__(self, engine: Engine, candidates: Tensor) -> Float[Tensor, "c"]:
        return (1 - self.weight) * self.a(engine, candidates) + self.weight * self.b(engine, candidates)


def delta_cosine_from(
    engine: Engine, vectors: SteeringVectors, layers: Sequence[int], weights: dict[int, float] | None = None
) -> DeltaCosine:
    """The effect of the first of `vectors` on the engine's prompts, as the thing to imitate."""
    clean, steered = _effect(engine, vectors, layers)
    delta = {layer: steered[layer] - clean[layer] for layer in layers}
    return DeltaCosine(delta=delta, clean=clean, weights=weights or {})


def steered_kl_from(engine: Engine, vectors: SteeringVectors, layer: int) -> SteeredKL:
    """The next-token distribution under the first of `vectors`, as the thing to imitate."""
    _, steered = _effect(engine, vectors, [layer])
    hidden = steered[layer].to(engine.model.dtype)
    with torch.no_grad():
        return SteeredKL(steered_logprobs=unembed(engine.model, hidden).float().log_softmax(-1), layer=layer)


def clean_prompts(engine: Engine) -> Prompts:
    """The problem's prompts with an empty slot, left-padded."""
    return Prompts.from_ids(engine.problem.filled([]), device=engine.device)


@torch.no_grad()
def _effect(
    engine: Engine, vectors: SteeringVectors, layers: Sequence[int]
) -> tuple[dict[int, Float[Tensor, "n d_model"]], dict[int, Float[Tensor, "n d_model"]]]:
    """(clean, steered) residuals at the last prompt token."""
    prompts = clean_prompts(engine)

    def last() -> dict[int, Tensor]:
        hidden = read(
            engine.model,
            input_ids=prompts.input_ids,
            attention_mask=prompts.attention_mask,
            layers=layers,
            position=slice(-1, None),
        )
        return {layer: hidden[layer][:, -1].float() for layer in layers}

    clean = last()
    with steer(engine.model, vectors.source_layer, vectors.theta[0].to(engine.device, engine.model.dtype)):
        return clean, last()
