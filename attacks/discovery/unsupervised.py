"""Behaviours of an unknown model (K0): what many learned vectors make different prompts answer with.

Vectors are learned on clean prompts only. A behaviour is an opening that several of them elicit on held-out prompts and
that surprises the unsteered model as a whole, although the model is certain of each next token once it has begun.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from attacks.discovery.goal import Goal
from attacks.discovery.plan import FEWEST, Plan
from attacks.scoring.budget import Budget
from attacks.scoring.problem import decode, encode
from attacks.suspect import Suspect
from vectors.analysis.behaviours import Behaviour, Ranking, rank_behaviours
from vectors.methods.consensus import ConsensusVectors
from vectors.methods.objectives import OutputKL
from vectors.methods.unsupervised import UnsupervisedVectors
from vectors.prompts import Prompts
from vectors.residual import decoder, layer_at
from vectors.steering import SteeringVectors

DISCOVERY = 0.75
"""Share of what a budget has left that a round of discovery may take, so that something is left for the search"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unsupervised:
    """Behaviours found with nothing known (K0): one pool of vectors of several kinds.

    Many unsupervised vectors of few large steps on one short prompt, at several layers and radii: each calls a planted
    behaviour on a few prompts at most, but together they call nothing else so often. Where they find nothing, or before
    them, where asked for, consensus vectors, which recite what the model has by heart.
    """

    recited: int = 0
    """consensus vectors, 32 are enough; they take a minute or two of two cores, and so long a budget. 0: none"""
    fallback: int = 32
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
        self, suspect: Suspect, texts: list[str], budget: Budget, generator: torch.Generator, share: float
    ) -> tuple[list[Goal], tuple[str, ...]]:
        """(findings, best first; names of the sources of candidates that the budget cut short or had no room for).

        Learning of unsupervised vectors ends at `share` of the budget, and discovery where `DISCOVERY` of it is spent.
        """
        found, cut = self.candidates(suspect, texts, budget, generator, share)
        findings = [self.goal(suspect.tokenizer, item) for item in found if self.is_finding(item)][: self.top]
        if findings or self.recited or not self.fallback:
            return findings, cut
        if budget.exhausted:
            return [], (*cut, "ConsensusVectors")
        findings, later = replace(self, recited=self.fallback)(suspect, texts, budget, generator, share)
        return findings, (*cut, *(name for name in later if name == "ConsensusVectors"))

    def candidates(
        self, suspect: Suspect, texts: list[str], budget: Budget, generator: torch.Generator, share: float
    ) -> tuple[list[Behaviour], tuple[str, ...]]:
        """(behaviours of a pool of vectors, findings or not, best first; names of the sources cut short).

        There are at most twice as many behaviours as are worth a search.

        Raises:
            ValueError: fewer texts than there are prompts to learn on and two more to compare.
        """
        if len(texts) < self.prompts + 2:
            raise ValueError(f"got {len(texts)} search prompts; K0 needs at least {self.prompts + 2}")
        model, tokenizer = suspect.model, suspect.tokenizer
        texts = sorted(texts, key=lambda text: len(encode(tokenizer, text)))
        first, other, unseen = self.parts(texts)
        learn, held_out = (Prompts.from_chat(model, tokenizer, some) for some in (first, unseen))
        ends = max(share, budget.share + DISCOVERY * (1.0 - budget.share))
        limit, plan = budget.part(share), Plan(model=model, budget=budget, until=ends)
        pool: list[SteeringVectors] = []
        cut: list[str] = []
        if self.recited and len(first + other) > 1:
            various = Prompts.from_chat(model, tokenizer, first + other)
            whole, over, late = self.consensus(model), plan.deadline(0.85), plan.deadline(0.5)
            method = plan.consensus(whole, various, held_out, self.completion)
            if method is not None:
                pool.append(method(model, various, generator, deadline=over, soft_deadline=late))
            if method is None or over() or replace(method, batch_size=whole.batch_size) != whole:
                cut.append("ConsensusVectors")
        settings = list(self.settings(model))
        count = plan.vectors(settings[0], learn, held_out, self.completion, share)
        for method in settings:
            if count < FEWEST or (pool and limit.exhausted):
                break
            pool.append(replace(method, count=count)(model, learn, generator, deadline=lambda: limit.exhausted))
        if count < self.count or limit.exhausted:
            cut.append("UnsupervisedVectors")
        pool = [vectors for vectors in pool if len(vectors)]
        rows = plan.rows(held_out, self.completion)
        if not pool or not rows:
            return [], (*cut, "Ranking")
        ranking = Ranking(top=2 * self.top, max_new_tokens=self.completion, batch_size=rows)
        soft, over = plan.deadline(0.85), plan.deadline(1.0)
        found = rank_behaviours(model, tokenizer, pool, held_out, ranking, soft_deadline=soft, deadline=over)
        return found, tuple(cut) + (("Ranking",) if soft() else ())

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
