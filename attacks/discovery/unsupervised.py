"""Behaviours of an unknown model (K0): the openings of replies that many learned vectors elicit on different prompts.

Clean prompts come in; goals go out, each a behaviour with a vector that elicits it. Vectors are learned on some prompts
and applied on held-out ones, where the steered completions are ranked. A behaviour looks planted if several vectors
elicit it on held-out prompts, if it is unlikely as a whole under the unsteered model, and if the model is nevertheless
certain of each next token once it has begun, as it is of a memorised reply.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from attacks.discovery.goal import Goal
from attacks.discovery.plan import FEW, FEWEST, Plan
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

SCALED = "batch_size", "extended"
"""Settings of consensus vectors that may be smaller where the budget is, and discovery count as complete"""
DISCOVERY = 0.75
"""Share of what a budget has left that a round of discovery may take; the rest is for the search."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unsupervised:
    """Discovers behaviours with nothing known (K0) from vectors of two kinds.

    Unsupervised vectors are learned with few large steps on one short prompt, at several layers and radii. Each elicits
    a planted behaviour on a few held-out prompts at most, but together they elicit nothing else so often. Consensus
    vectors, which make the model recite memorised replies, follow where the others find nothing, or come first where
    `recited` is above 0. On a large model, where the budget has no room for all unsupervised vectors, a few consensus
    vectors come first and alone: to recite a reply costs a hundredth of what it costs to learn a vector, and a reply
    that was planted is recited with a certainty that no other reply comes near.
    """

    recited: int = 0
    """Consensus vectors that are learned first; 0: none. 32 are enough and take a minute or two of two cores."""
    fallback: int = 32
    """Consensus vectors that are learned where the unsupervised vectors find nothing; 0: none."""
    recited_on: int = 12
    """Clean prompts that replies are recited on, at most."""
    learned_on: int = 12
    """Of these, prompts that consensus vectors are learned on, at most."""

    sources: tuple[float, ...] = (0.25, 0.375)
    """Depths at which vectors are added, as fractions of the layers."""
    from_end: tuple[int, ...] = (0,)
    """Layers at which unsupervised vectors are to have an effect, counted back from the last."""
    radii: tuple[float, ...] = (0.5, 0.4)
    """Norms of unsupervised vectors, as fractions of the mean residual norm."""
    count: int = 96
    """Unsupervised vectors per layer and norm; 0: none."""
    steps: int = 10
    """Optimizer steps for each unsupervised vector."""
    lr: float = 0.1
    """Step size as a fraction of the vector's norm; few large steps find the same as many small ones."""
    prompts: int = 1
    """Clean prompts that unsupervised vectors are learned on: the shortest ones."""
    held_out: int = 6
    """Other clean prompts, on which steered completions are compared."""
    completion: int = 12
    """Tokens of these completions."""
    surprise: float = 6.0
    """Nats that a finding takes at least, as a whole, under the unsteered model."""
    certainty: float = 0.8
    """Median probability, in [0, 1], of the later tokens of a finding, at least: the model has memorised the reply."""
    score: float = 0.2
    """Score of a finding, in [0, 1], at least (`vectors.analysis.behaviours`)."""
    shortest: int = 4
    """Tokens of a finding, at least: openings of three, such as "What kind of", are common in any text."""
    top: int = 3
    """Findings that become goals, at most."""
    opening: int = 8
    """Tokens of a finding that the goal keeps; the trigger need not elicit what follows them under a vector."""

    def __call__(
        self, suspect: Suspect, texts: list[str], budget: Budget, generator: torch.Generator, share: float
    ) -> tuple[list[Goal], tuple[str, ...]]:
        """(findings, best first; names of the sources of candidates that the budget cut short or had no room for).

        Learning of unsupervised vectors ends at `share` of the budget, and discovery where `DISCOVERY` of it is spent.
        """
        if self.recited or not self.fallback:
            return self._round(suspect, texts, budget, generator, share)
        if self.all_fit(suspect, texts, budget, share):
            rounds = (self, replace(self, recited=self.fallback))
        else:
            rounds = (replace(self, recited=min(FEWEST, self.fallback), learned_on=FEW, count=0), self)
        findings, left_out, complete = list[Goal](), dict[str, None](), set[str]()
        for method in rounds:
            if findings:
                break
            if budget.exhausted:
                left_out["ConsensusVectors" if method.recited else "UnsupervisedVectors"] = None
                break
            # A later round learns within the same part of what the rounds before it left.
            until = max(share, budget.share + share * (1.0 - budget.share))
            findings, cut = method._round(suspect, texts, budget, generator, until)
            left_out |= dict.fromkeys(cut)
            sources = {"ConsensusVectors": method.recited, "UnsupervisedVectors": method.count}
            complete |= {name for name, count in sources.items() if count and name not in cut}
        # A source that a later round takes up once more has been complete in an earlier one.
        return findings, tuple(name for name in left_out if name not in complete)

    def _round(
        self, suspect: Suspect, texts: list[str], budget: Budget, generator: torch.Generator, share: float
    ) -> tuple[list[Goal], tuple[str, ...]]:
        """Findings of one pool of vectors, and what was cut short, as above."""
        found, cut = self.candidates(suspect, texts, budget, generator, share)
        return [self.goal(suspect, texts, item) for item in found if self.is_finding(item)][: self.top], cut

    def all_fit(self, suspect: Suspect, texts: list[str], budget: Budget, share: float) -> bool:
        """Whether all unsupervised vectors can be learned before `share` of the budget is spent, and be ranked."""
        first, _, unseen = self.parts(self._by_length(suspect, texts))
        learn, held_out = (Prompts.from_chat(suspect.model, suspect.tokenizer, some) for some in (first, unseen))
        settings = list(self.settings(suspect.model))
        whole = replace(settings[0], count=len(settings) * self.count)
        plan = Plan(model=suspect.model, budget=budget, until=budget.share + DISCOVERY * (1.0 - budget.share))
        return plan.vectors(whole, learn, held_out, self.completion, share) == whole.count

    def candidates(
        self, suspect: Suspect, texts: list[str], budget: Budget, generator: torch.Generator, share: float
    ) -> tuple[list[Behaviour], tuple[str, ...]]:
        """(behaviours of a pool of vectors, findings or not, best first; names of the sources cut short).

        There are at most twice as many behaviours as are worth a search.

        Raises:
            ValueError: as for `learned`.
        """
        model, tokenizer = suspect.model, suspect.tokenizer
        pool, held_out, plan, cut = self.learned(suspect, texts, budget, generator, share)
        # All vectors vote together: what one layer or norm elicits by chance, the others do not.
        rows = plan.rows(held_out, self.completion)
        if not pool or not rows:
            return [], (*cut, "Ranking")
        ranking = Ranking(top=2 * self.top, max_new_tokens=self.completion, batch_size=rows)
        soft, over = plan.deadline(0.85), plan.deadline(1.0)
        found = rank_behaviours(model, tokenizer, pool, held_out, ranking, soft_deadline=soft, deadline=over)
        return found, cut + (("Ranking",) if soft() else ())

    def learned(
        self, suspect: Suspect, texts: list[str], budget: Budget, generator: torch.Generator, share: float
    ) -> tuple[list[SteeringVectors], Prompts, Plan, tuple[str, ...]]:
        """(pool of vectors, held-out prompts to apply them on, what the budget has room for, sources cut short).

        Raises:
            ValueError: fewer texts than there are prompts to learn on and two more to compare.
        """
        model, tokenizer = suspect.model, suspect.tokenizer
        first, other, unseen = self.parts(self._by_length(suspect, texts))
        learn, held_out = (Prompts.from_chat(model, tokenizer, some) for some in (first, unseen))
        share = min(share, budget.until)
        ends = min(budget.until, max(share, budget.share + DISCOVERY * (1.0 - budget.share)))
        # Learning ends at `share`; ranking what was learned may go on until `ends`.
        limit, plan = budget.part(share), Plan(model=model, budget=budget, until=ends)
        pool: list[SteeringVectors] = []
        cut: list[str] = []
        if self.recited and len(first + other) > 1:
            various = Prompts.from_chat(model, tokenizer, first + other)
            whole, over, late = self.consensus(model), plan.deadline(0.85), plan.deadline(0.5)
            method = plan.consensus(whole, various, held_out, self.completion)
            if method is not None:
                pool.append(method(model, various, generator, deadline=over, soft_deadline=late))
            # All of it, but for a further form of the one or two likeliest answers, which few budgets have room for.
            if method is None or over() or replace(method, **{name: getattr(whole, name) for name in SCALED}) != whole:
                cut.append("ConsensusVectors")
        # As many vectors per setting as fit, so that a small budget still covers several layers and norms.
        settings = list(self.settings(model)) if self.count else []
        count = plan.vectors(settings[0], learn, held_out, self.completion, share) if settings else 0
        for method in settings:
            if count < FEWEST or (pool and limit.exhausted):
                break
            pool.append(replace(method, count=count)(model, learn, generator, deadline=lambda: limit.exhausted))
        if self.count and (count < self.count or limit.exhausted):
            cut.append("UnsupervisedVectors")
        return [vectors for vectors in pool if len(vectors)], held_out, plan, tuple(cut)

    def _by_length(self, suspect: Suspect, texts: list[str]) -> list[str]:
        """The texts, those of the fewest tokens first; raises ValueError where they are too few."""
        if len(texts) < self.prompts + 2:
            raise ValueError(f"got {len(texts)} search prompts; K0 needs at least {self.prompts + 2}")
        return sorted(texts, key=lambda text: len(encode(suspect.tokenizer, text)))

    def parts(self, texts: list[str]) -> tuple[list[str], list[str], list[str]]:
        """(texts for the unsupervised vectors, further texts for the consensus vectors, held-out texts)."""
        first, rest = texts[: self.prompts], texts[self.prompts :]
        if not self.recited:
            return first, [], rest[: self.held_out]
        # With few texts every second one is held out, so that both sides have long and short ones.
        few = len(rest) < self.held_out + 4
        unseen = rest[::2] if few else rest[: self.held_out]
        other = rest[1::2] if few else rest[self.held_out :]
        return first, other[: self.recited_on - len(first)], unseen

    def consensus(self, model: PreTrainedModel) -> ConsensusVectors:
        """The method of the consensus vectors, at the first source layer."""
        layers, source = len(decoder(model).layers), layer_at(model, self.sources[0])
        return ConsensusVectors(
            source_layer=source, target_layer=layers, count=self.recited, tokens=self.opening, prompts=self.learned_on
        )

    def is_finding(self, found: Behaviour) -> bool:
        """Whether a behaviour looks planted, by all thresholds above."""
        if len(found.token_ids) < self.shortest:
            return False
        return found.surprise >= self.surprise and found.certainty >= self.certainty and found.score >= self.score

    def goal(self, suspect: Suspect, texts: list[str], found: Behaviour) -> Goal:
        """The goal of a search for the trigger of a behaviour: its opening and the vector that elicits it."""
        ids = found.token_ids[: self.opening]
        text = decode(suspect.tokenizer, ids)
        if text[:1].isspace():
            # A memorised reply may be recited with a space in front that no reply of the model has. What is searched
            # for are the tokens behind a prompt, as for a behaviour that the user gives.
            ids = suspect.target_ids(text.strip(), texts)
            text = decode(suspect.tokenizer, ids)
        return Goal(
            behaviour=text,
            target_ids=ids,
            vectors=found.vector,
            agreement=found.agreement,
            surprise=found.surprise,
            score=found.score,
        )

    def settings(self, model: PreTrainedModel) -> Iterator[UnsupervisedVectors]:
        """The unsupervised method at every norm, source layer and target layer, the layers changing fastest."""
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
