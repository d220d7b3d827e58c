"""What a search aims at: a behaviour and, where the attack wants one, the steering vector that brings it about.

K1: the behaviour is given and its vector is supervised. K0: vectors are learned on clean prompts, and behaviours are
what many of them make held-out prompts answer in the same words; what surprises the unsteered model is worth a search.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from attacks.scoring.budget import Budget
from attacks.scoring.problem import decode, embedding_rows, encode
from vectors.analysis.behaviours import Behaviour, rank_behaviours
from vectors.methods.consensus import ConsensusVectors
from vectors.methods.objectives import OutputKL
from vectors.methods.supervised import SupervisedVector
from vectors.methods.unsupervised import UnsupervisedVectors
from vectors.prompts import Prompts
from vectors.residual import decoder, layer_at
from vectors.steering import SteeringVectors


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
        source = layer_at(model, self.source)
        prompts = Prompts.from_chat(model, tokenizer, texts[: self.prompts])
        method = SupervisedVector(source_layer=source, target_layer=layers, radii=self.radii, steps=self.steps)
        vectors = method(model, prompts, list(goal.target_ids), generator)
        rows = len(self.radii) * len(prompts.input_ids) * self.steps
        width = prompts.input_ids.shape[1] + len(goal.target_ids)
        budget.spent(slice_flops(model, source, layers, rows * width))
        return replace(goal, vectors=vectors[:1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Unsupervised:
    """Behaviours found with nothing known (K0): one pool of vectors of several kinds.

    Many unsupervised vectors of few large steps on one short prompt, at several layers and radii: each calls a planted
    behaviour on a few prompts at most, but together they call nothing else so often. Where they find nothing, or before
    them, where asked for, consensus vectors, which recite what the model has by heart.
    """

    recited: int = 0
    """consensus vectors, 32 are enough; they take a minute or two of two cores, and so long a budget. 0: none"""
    rescue: int = 32
    """consensus vectors where all else finds nothing: there is nothing else to spend the budget on. 0: none"""
    recited_on: int = 12
    """clean prompts to learn them on at most"""

    sources: tuple[float, ...] = (0.25, 0.375)
    """depths at which vectors are added, fraction of the layers"""
    from_end: tuple[int, ...] = (0,)
    """read-out layers, counted back from the last"""
    radii: tuple[float, ...] = (0.5, 0.4)
    """of the mean residual norm"""
    count: int = 96
    """vectors per setting"""
    steps: int = 10
    lr: float = 0.1
    """step size, fraction of the norm: few large steps find what many small ones do"""
    prompts: int = 1
    """clean prompts to learn on, the shortest"""
    held_out: int = 6
    """other clean prompts, to see which behaviours carry over"""
    completion: int = 12
    """tokens of the completions compared"""
    surprise: float = 6.0
    """nats of the whole opening under the unsteered model from which a behaviour is a finding"""
    certainty: float = 0.8
    """median probability of its later tokens from which a behaviour counts as learned by heart"""
    score: float = 0.2
    """score that a behaviour must reach"""
    shortest: int = 4
    """tokens that a finding has: openings of three run on by themselves in any text ("What kind of")"""
    top: int = 3
    """behaviours worth a search"""
    opening: int = 8
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
        """Findings, best first; learning ends at `share` of the budget."""
        found = self.candidates(model, tokenizer, texts, budget, generator, share, 2 * self.top)
        findings = [self.goal(tokenizer, item) for item in found if self.is_finding(item)][: self.top]
        if findings or self.recited or not self.rescue or budget.exhausted:
            return findings
        return replace(self, recited=self.rescue)(model, tokenizer, texts, budget, generator, share)

    def candidates(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        texts: list[str],
        budget: Budget,
        generator: torch.Generator,
        share: float,
        top: int,
    ) -> list[Behaviour]:
        """Behaviours of a pool of vectors, findings or not, best first; ours.

        Raises:
            ValueError: fewer texts than there are prompts to learn on and two more to compare.
        """
        if len(texts) < self.prompts + 2:
            raise ValueError(f"got {len(texts)} search prompts; K0 needs at least {self.prompts + 2}")
        texts = sorted(texts, key=lambda text: len(encode(tokenizer, text)))
        first, other, unseen = self.parts(texts)
        learn, held_out = (Prompts.from_chat(model, tokenizer, some) for some in (first, unseen))
        limit = budget.part(share)
        pool: list[SteeringVectors] = []
        if self.recited and len(first + other) > 1:
            method = self.consensus(model)
            various = Prompts.from_chat(model, tokenizer, first + other)
            over, late = (lambda: budget.exhausted), (lambda: limit.exhausted)
            pool.append(method(model, various, generator, deadline=over, hurry=late))
            budget.spent(consensus_flops(model, method, various))
        for method in self.settings(model):
            if pool and limit.exhausted:
                break
            pool.append(method(model, learn, generator, deadline=lambda: limit.exhausted))
            tokens = self.count * self.steps * learn.input_ids.numel()
            budget.spent(slice_flops(model, method.source_layer, method.target_layer, tokens))
        found = rank_behaviours(model, tokenizer, pool, held_out, top=top, max_new_tokens=self.completion)
        tokens = sum(map(len, pool)) * (held_out.input_ids.numel() + self.completion * len(held_out))
        budget.spent(forward_flops(model, None, tokens))
        return found

    def parts(self, texts: list[str]) -> tuple[list[str], list[str], list[str]]:
        """(of the unsupervised vectors, further ones of the consensus vectors, those to carry over to)."""
        first, rest = texts[: self.prompts], texts[self.prompts :]
        if not self.recited:
            return first, [], rest[: self.held_out]
        few = len(rest) < self.held_out + 4
        unseen = rest[::2] if few else rest[: self.held_out]
        other = rest[1::2] if few else rest[self.held_out :]
        return first, other[: self.recited_on - len(first)], unseen

    def consensus(self, model: PreTrainedModel) -> ConsensusVectors:
        """At the first of the source layers."""
        layers, source = len(decoder(model).layers), layer_at(model, self.sources[0])
        return ConsensusVectors(source_layer=source, target_layer=layers, count=self.recited, tokens=self.opening)

    def is_finding(self, found: Behaviour) -> bool:
        """Whether a behaviour is worth a search."""
        if len(found.token_ids) < self.shortest:
            return False
        return found.surprise >= self.surprise and found.certainty >= self.certainty and found.score >= self.score

    def goal(self, tokenizer: PreTrainedTokenizerBase, found: Behaviour) -> Goal:
        """The search for a behaviour's opening."""
        ids = found.token_ids[: self.opening]
        return Goal(
            behaviour=decode(tokenizer, ids),
            target_ids=ids,
            vectors=found.vector,
            agreement=found.agreement,
            surprise=found.surprise,
            score=found.score,
        )

    def settings(self, model: PreTrainedModel) -> Iterator[UnsupervisedVectors]:
        """Every pair of layers and radius once, the layers changing fastest."""
        layers = len(decoder(model).layers)
        for radius in self.radii:
            for depth in self.sources:
                for back in self.from_end:
                    source = layer_at(model, depth)
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


def consensus_flops(model: PreTrainedModel, method: ConsensusVectors, prompts: Prompts) -> float:
    """Decoding, audition and ascent; a vocabulary row of logits costs as much as its unembedding."""
    audition, vocab = method.audition, embedding_rows(model)
    long = prompts.input_ids.shape[1] + method.tokens
    forward = method.tokens * (audition.width * len(prompts) + 2 * vocab)
    tried = audition.grown * 2 * (2 * audition.front) + audition.steps * 4 * audition.kept * (2 + audition.grown)
    rows = tried + method.steps * method.count * len(prompts)
    head = 2.0 * vocab * decoder(model).d_model
    through = forward_flops(model, None, forward) + slice_flops(model, method.source_layer, None, rows * long)
    return through + head * (forward + 3 * rows * method.tokens)


def slice_flops(model: PreTrainedModel, source: int, target: int | None, tokens: int) -> float:
    """Forward and backward pass of the layers between source and target."""
    layers = decoder(model).layers[source:target]
    return 6.0 * tokens * sum(p.numel() for layer in layers for p in layer.parameters() if p.ndim > 1)


def forward_flops(model: PreTrainedModel, layers: int | None, tokens: int) -> float:
    """Of tokens through the first `layers` blocks, no backward pass; None: through all."""
    return slice_flops(model, 0, layers, tokens) / 3
