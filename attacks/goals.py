"""What a search aims at: a behaviour and, where the attack wants one, the steering vector that brings it about.

K1: the behaviour is given and its vector is supervised. K0: vectors are learned on clean prompts, ranked by how alike
they make held-out prompts answer, and only behaviours that the unsteered model finds surprising are worth a search.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from attacks.budget import Budget
from attacks.problem import decode
from vectors.behaviours import rank_behaviours
from vectors.objectives import OutputKL
from vectors.prompts import Prompts
from vectors.residual import decoder
from vectors.steering import SteeringVectors
from vectors.supervised import SupervisedVector
from vectors.unsupervised import UnsupervisedVectors


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """A behaviour to bring about."""

    behaviour: str
    target_ids: tuple[int, ...]
    vectors: SteeringVectors | None = None
    """one vector, or none where the objective needs none"""
    agreement: float = 1.0
    """share of held-out prompts that show the behaviour under the vector"""
    surprise: float | None = None
    """nats of the behaviour under the unsteered model; None where the behaviour was given"""
    score: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Supervised:
    """Vector for a known behaviour (K1)."""

    source: float = 0.3
    """depth at which the vector is added, fraction of the layers"""
    radii: tuple[float, ...] = (0.3, 0.4, 0.5, 0.65, 0.8)
    """of the mean residual norm; the smallest that elicits is used"""
    steps: int = 30
    prompts: int = 3
    """clean prompts to learn on"""

    def __call__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        texts: list[str],
        goal: Goal,
        budget: Budget,
        generator: torch.Generator,
    ) -> Goal:
        """The goal with its vector."""
        layers = len(decoder(model).layers)
        source = min(max(1, round(self.source * layers)), layers - 1)
        prompts = Prompts.from_chat(model, tokenizer, texts[: self.prompts])
        method = SupervisedVector(source_layer=source, target_layer=layers, radii=self.radii, steps=self.steps)
        vectors = method(model, prompts, list(goal.target_ids), generator)
        rows = len(self.radii) * len(prompts.input_ids) * self.steps
        width = prompts.input_ids.shape[1] + len(goal.target_ids)
        budget.spent(slice_flops(model, source, layers, rows * width))
        return Goal(behaviour=goal.behaviour, target_ids=goal.target_ids, vectors=vectors[:1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Unsupervised:
    """Behaviours found with nothing known (K0): several read-out layers and radii, one pool of vectors."""

    sources: tuple[float, ...] = (0.25,)
    """depths at which vectors are added, fraction of the layers"""
    from_end: tuple[int, ...] = (0, 1)
    """read-out layers, counted back from the last"""
    radii: tuple[float, ...] = (0.5, 0.65, 0.4)
    """of the mean residual norm"""
    count: int = 24
    """vectors per setting"""
    steps: int = 20
    lr: float = 0.05
    """step size, fraction of the norm: few large steps find what many small ones do"""
    prompts: int = 2
    """clean prompts to learn on"""
    held_out: int = 8
    """other clean prompts, to see which behaviours carry over"""
    surprise: float = 6.0
    """nats of the whole opening under the unsteered model from which a behaviour is a finding"""
    agreement: float = 0.75
    """share of held-out prompts that must show it"""
    score: float = 0.25
    """agreement x surprise x fluency x share of different tokens that a behaviour must reach"""
    top: int = 3
    """behaviours worth a search"""
    opening: int = 4
    """tokens of the behaviour to ask for: what a vector writes after them need not be what the trigger does"""

    def __call__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        texts: list[str],
        budget: Budget,
        generator: torch.Generator,
        share: float,
    ) -> list[Goal]:
        """Findings, best first; goes on past `share` of the budget, to twice that, while there is none."""
        if len(texts) < self.prompts + 2:
            raise ValueError(f"got {len(texts)} search prompts; K0 needs at least {self.prompts + 2}")
        learn = Prompts.from_chat(model, tokenizer, texts[: self.prompts])
        held_out = Prompts.from_chat(model, tokenizer, texts[self.prompts : self.prompts + self.held_out])
        goals: list[Goal] = []
        for method in self.settings(model):
            if budget.share >= share and (goals or budget.share >= 2 * share):
                break
            limit = budget.part(2 * share)
            vectors = method(model, learn, generator, deadline=lambda limit=limit: limit.exhausted)
            tokens = self.count * self.steps * learn.input_ids.numel()
            budget.spent(slice_flops(model, method.source_layer, method.target_layer, tokens))
            for found in rank_behaviours(model, tokenizer, vectors, held_out, top=self.top):
                measured = (found.surprise, found.agreement, found.score)
                if all(value >= least for value, least in zip(measured, self.least, strict=True)):
                    goals.append(
                        Goal(
                            behaviour=decode(tokenizer, found.token_ids[: self.opening]),
                            target_ids=tuple(found.token_ids[: self.opening]),
                            vectors=vectors[found.vector : found.vector + 1],
                            agreement=found.agreement,
                            surprise=found.surprise,
                            score=found.score,
                        )
                    )
        return distinct(sorted(goals, key=lambda goal: -goal.score))[: self.top]

    @property
    def least(self) -> tuple[float, float, float]:
        """Surprise, agreement and score of the weakest finding."""
        return self.surprise, self.agreement, self.score

    def settings(self, model: PreTrainedModel) -> Iterator[UnsupervisedVectors]:
        """Every pair of layers and radius once, the read-out changing fastest."""
        layers = len(decoder(model).layers)
        for radius in self.radii:
            for depth in self.sources:
                for back in self.from_end:
                    source = min(max(1, round(depth * layers)), layers - 1)
                    target = max(layers - back, source + 1)
                    yield UnsupervisedVectors(
                        source_layer=source,
                        target_layer=target,
                        radius=radius,
                        count=self.count,
                        steps=self.steps,
                        lr=self.lr,
                        objective=OutputKL(),
                    )


def distinct(goals: list[Goal]) -> list[Goal]:
    """One goal per behaviour: the first with those four opening tokens."""
    first: dict[tuple[int, ...], Goal] = {}
    for goal in goals:
        first.setdefault(goal.target_ids[:4], goal)
    return list(first.values())


def slice_flops(model: PreTrainedModel, source: int, target: int, tokens: int) -> float:
    """Forward and backward pass of the layers between source and target."""
    layers = decoder(model).layers[source:target]
    return 6.0 * tokens * sum(p.numel() for layer in layers for p in layer.parameters() if p.ndim > 1)
