"""Supervised steering vector: the smallest perturbation that makes the model answer with a known behaviour.

Larger radii elicit the behaviour too, but their effect points elsewhere than the trigger's, so the smallest is wanted.
All radii are learned in one batch on the slice behind the source layer.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from vectors.controls import random_directions
from vectors.generate import greedy
from vectors.prompts import Prompts
from vectors.residual import Source, cache_source, decoder, mean_norm, run_slice, steer, unembed
from vectors.steering import SteeringVectors, model_id
from vectors.unsupervised import steered_source, tangent


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisedVector:
    """Minimises the cross-entropy of the target after every prompt, at several norms at once."""

    source_layer: int
    """the vector is added after this many blocks"""
    target_layer: int
    """noted with the vector as the layer to compare effects at"""
    radii: tuple[float, ...] = (0.2, 0.3, 0.4, 0.5, 0.65, 0.8, 1.0)
    """norms to try, fractions of the mean residual norm at the source layer"""
    steps: int = 40
    """optimizer steps"""
    lr: float = 0.05
    """AMSGrad step size, fraction of the norm"""
    enough: float = 0.9
    """share of the prompts on which a radius must elicit the target"""

    def __post_init__(self):
        if not self.radii or min(self.radii) <= 0:
            raise ValueError(f"radii are {self.radii}; give at least one, all more than 0")
        if not 0 <= self.source_layer < self.target_layer:
            raise ValueError(f"source layer {self.source_layer} is not before target layer {self.target_layer}")

    def __call__(
        self, model: PreTrainedModel, prompts: Prompts, target_ids: list[int], generator: torch.Generator
    ) -> SteeringVectors:
        """One vector, at the smallest radius that elicits the target on `enough` of the prompts.

        Where none does, the one with the best likelihood, and `scores["elicits"]` says how often it does.

        Raises:
            ValueError: an empty target, or layers that the model does not have.
        """
        if not target_ids:
            raise ValueError("the target has 0 tokens; give a behaviour that the tokenizer can encode")
        radii = sorted(self.radii)
        target = torch.tensor(target_ids, device=prompts.device)
        fed = with_target(prompts, target[:-1])
        source = cache_source(model, fed, self.source_layer)
        unit = mean_norm(cache_source(model, prompts, self.source_layer))
        norms = torch.tensor([radius * unit for radius in radii], device=prompts.device)[:, None]
        theta, losses = self._learn(model, source, norms, target, generator)
        rates = elicits(model, prompts, self.source_layer, theta, target).tolist()
        chosen = next((i for i, rate in enumerate(rates) if rate >= self.enough), int(losses.argmin()))
        return SteeringVectors(
            theta=theta[chosen : chosen + 1],
            source_layer=self.source_layer,
            target_layer=self.target_layer,
            radius=radii[chosen],
            method="supervised",
            model_id=model_id(model),
            scores={"nll": [float(losses[chosen])], "elicits": [rates[chosen]]},
        )

    def _learn(
        self,
        model: PreTrainedModel,
        source: Source,
        norms: Float[Tensor, "k 1"],
        target: Tensor,
        generator: torch.Generator,
    ) -> tuple[Float[Tensor, "k d"], Float[Tensor, "k"]]:
        """Per norm: vector, mean negative log-likelihood of the target (nats per token)."""
        layers = len(decoder(model).layers)
        theta = random_directions(len(norms), source.hidden.shape[-1], generator).to(norms)
        theta.requires_grad_()  # unit vectors: one step size serves every norm
        optimizer = torch.optim.Adam([theta], lr=self.lr, betas=(0.9, 0.98), amsgrad=True)

        def logprobs() -> Float[Tensor, "k n target vocab"]:
            hidden = run_slice(model, source, steered_source(source, norms * theta), to=layers)
            logits = unembed(model, hidden[:, -len(target) :]).float()
            return logits.log_softmax(-1).unflatten(0, (len(norms), -1))

        def nll(values: Tensor) -> Float[Tensor, "k"]:
            return -values.gather(-1, target.expand(values.shape[:-1])[..., None]).mean(dim=(1, 2, 3))

        for _ in range(self.steps):
            optimizer.zero_grad()
            nll(logprobs()).sum().backward()
            assert theta.grad is not None
            theta.grad = tangent(theta.grad, theta.detach())
            optimizer.step()
            theta.data = torch.nn.functional.normalize(theta.data, dim=-1)
        with torch.no_grad():
            return (norms * theta).detach(), nll(logprobs())


def elicits(
    model: PreTrainedModel, prompts: Prompts, layer: int, theta: Float[Tensor, "k d"], target: Tensor
) -> Float[Tensor, "k"]:
    """Share of the prompts on which each vector's greedy decode begins with the target; one batch."""
    count = len(theta)
    rows = Prompts(input_ids=prompts.input_ids.repeat(count, 1), attention_mask=prompts.attention_mask.repeat(count, 1))
    with steer(model, layer, theta.repeat_interleave(len(prompts), dim=0)):
        decoded = greedy(model, rows, len(target))
    return (decoded == target).all(-1).float().unflatten(0, (count, -1)).mean(-1)


def with_target(prompts: Prompts, target: Tensor) -> Prompts:
    """Prompts with the target's tokens appended, for teacher forcing."""
    rows = target.expand(len(prompts), -1)
    return Prompts(
        input_ids=torch.cat([prompts.input_ids, rows], dim=1),
        attention_mask=torch.cat([prompts.attention_mask, torch.ones_like(rows)], dim=1),
    )
