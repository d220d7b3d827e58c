"""Stages of an attack: each looks for triggers in its own way and shows them to the selection by behaviour."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, cycle, islice, repeat

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from attacks.discovery.goals import Goal
from attacks.judging.judge import Selection
from attacks.judging.shrinking import delete_one
from attacks.scoring.budget import Budget
from attacks.scoring.engine import Engine, Objective
from attacks.scoring.problem import encode
from attacks.searchers.gcg import GCG
from attacks.searchers.searcher import Found, OnBest, Searcher
from attacks.stages.dictionary import rank_words
from attacks.stages.sampling.leakage import Leakage
from attacks.stages.sampling.ngrams import mine, verify
from attacks.stages.sampling.sampler import Sampler, clean_and_wanted
from attacks.stages.token_ranking import rank_tokens

PROBE_TOKENS = 2
"""Tokens of the behaviour that a whole vocabulary or dictionary is ranked by, on one prompt"""

Build = Callable[[Engine, Goal], Objective]
"""Makes the objective of a goal on the engine's prompts"""


@dataclass(kw_only=True)
class Hunt:
    """What a stage works with."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    engine: Engine
    texts: list[str]
    """the search prompts, slot left out"""
    goal: Goal
    build: Build
    budget: Budget
    selection: Selection
    generator: torch.Generator
    provisional: bool = False
    """whether what works may stand for something simpler, which other stages look for"""

    def __post_init__(self):
        self._began = self.budget.share

    @cached_property
    def objective(self) -> Objective:
        """On all search prompts."""
        return self.built(self.engine, self.goal)

    @property
    def works(self) -> bool:
        """Whether the winner is good enough."""
        return self.selection.asr >= self.selection.enough

    @property
    def sure(self) -> bool:
        """Whether it is good enough and calls the behaviour surely."""
        best = self.selection.best
        return self.works and best is not None and self.selection.sure(best.trigger_ids)

    @property
    def over(self) -> bool:
        """Whether there is nothing left to spend or to win."""
        return self.budget.exhausted or (self.works and not self.provisional)

    def shrunk(self) -> tuple[int, ...]:
        """The winner without the tokens that it does not need; empty where there is none."""
        best = self.selection.best
        if best is None:
            return ()
        return delete_one(best.trigger_ids, self.selection.rate, surprisal=self.selection.surprisal).trigger_ids

    def settle(self, longest: int | None) -> None:
        """What works is provisional if, once shrunk, it has more tokens or is not sure; None: it is not."""
        if self.works and longest is not None:
            winner = self.shrunk()
            self.provisional = len(winner) > longest or not self.selection.sure(winner)

    def part(self, share: float) -> Budget:
        """That share of the hunt's budget, from now on."""
        until = self.budget.share + share * (self.budget.until - self._began)
        return self.budget.part(min(until, self.budget.until))

    def probe(self) -> tuple[Engine, Objective]:
        """The first prompt alone and its objective: cheap enough for tens of thousands of candidates."""
        probe = Engine(self.model, self.engine.problem.take([0]))
        self.budget.spent(probe.flops)
        return probe, self.built(probe, replace(self.goal, target_ids=self.goal.target_ids[:PROBE_TOKENS]))

    def built(self, engine: Engine, goal: Goal) -> Objective:
        """The objective; what it took to make it is booked."""
        with self.budget.booking(engine):
            return self.build(engine, goal)

    def try_until_sure(self, found: Found) -> bool:
        """Shows a trigger to the selection; true once the winner is sure."""
        self.selection(found)
        return self.sure

    def try_all(self, found: Iterable[Found]) -> None:
        """Shows triggers to the selection: all of them, for the first that works need not be the best."""
        for item in found:
            self.selection(item)
            if self.budget.exhausted:
                return

    def try_best(self, found: Iterable[Found], count: int) -> None:
        """Shows that many to the selection, of those that a user could type."""
        self.try_all(islice((item for item in found if self.engine.problem.retokenizes(item.trigger_ids)), count))


Stage = Callable[[Hunt], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Every allowed token by itself, by its exact loss on one prompt."""

    share: float = 0.12
    """of the budget, at most"""
    tried: int = 8
    """best ones that are judged by behaviour"""

    def __call__(self, hunt: Hunt) -> None:
        probe, objective = hunt.probe()
        empty = torch.zeros(1, dtype=torch.long)
        hunt.try_all(rank_tokens(probe, objective, empty, 0, budget=hunt.part(self.share))[: self.tried])


@dataclass(frozen=True, slots=True, kw_only=True)
class Dictionary:
    """Words of several tokens, the commonest first, by their exact loss on one prompt: people plant words."""

    share: float = 0.12
    """of the budget, at most"""
    tried: int = 8
    """best ones that are judged by behaviour"""
    words: int = 30_000
    """of the dictionary"""

    def __call__(self, hunt: Hunt) -> None:
        probe, objective = hunt.probe()
        hunt.try_all(rank_words(probe, objective, self.words, budget=hunt.part(self.share))[: self.tried])


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounds:
    """A searcher at one slot length after another, over and over."""

    rounds: tuple[tuple[int, Searcher], ...]
    """(tokens in the slot, searcher)"""
    share: float = 1.0
    """of the budget, at most"""
    times: int | None = None
    """how often they are gone through; None: until the budget is spent"""
    settles: int | None = None
    """tokens of the longest winner that ends the hunt, if it is sure: another may be a neighbour of a phrase. None: any
    ends it"""
    sure: bool = False
    """whether only a sure winner ends it: what else works on the `select` prompts may be the luckiest of many, so what
    is left of the budget goes into better ones"""

    def __call__(self, hunt: Hunt) -> None:
        budget = hunt.part(self.share)
        tell: OnBest = hunt.try_until_sure if self.sure else hunt.selection
        again = cycle(self.rounds) if self.times is None else chain.from_iterable(repeat(self.rounds, self.times))
        for length, searcher in again:
            if budget.exhausted or (hunt.sure if self.sure else hunt.works):
                return
            hunt.engine.problem = hunt.engine.problem.resized(length)
            searcher(hunt.engine, hunt.objective, hunt.generator, budget, tell)
            hunt.settle(self.settles)


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """N-grams of what the model writes in the user's place, verified; the best one begins a GCG run."""

    sampler: Sampler | Leakage
    """Leakage samples the model unsteered"""
    behaviour_weight: float = 1.0
    """b in v_clean + b v_Y; 0: the clean-prompt vector alone"""
    share: float = 0.5
    """of the budget, at most, for the samples"""
    whole: float = 1.0
    """of the budget, at most, for all of the stage: samples, their n-grams, GCG from the best"""
    learning: float = 0.5
    """of that share, at most, to learn the vectors"""
    grams: int = 20_000
    """mined n-grams that are verified"""
    gcg: GCG = GCG(steps=60, search_width=128, topk=128, patience=15)
    """continues from the best n-gram"""
    settles: int | None = None
    """tokens of the longest winner of GCG that ends the hunt, as in `Rounds`"""

    def __call__(self, hunt: Hunt) -> None:
        if hunt.works:
            return
        budget = hunt.part(self.whole)
        samples = self._samples(hunt)
        grams = mine(samples, [encode(hunt.tokenizer, text) for text in hunt.texts])[: self.grams]
        best = verify(hunt.engine, hunt.objective, grams, budget=budget, on_best=hunt.selection)
        if best and not (budget.exhausted or hunt.works):
            ids = torch.tensor([best[0].trigger_ids])
            hunt.engine.problem = hunt.engine.problem.resized(ids.shape[1])
            gcg = replace(self.gcg, initial=ids)
            gcg(hunt.engine, hunt.objective, hunt.generator, budget, hunt.selection)
            hunt.settle(self.settles)

    def _samples(self, hunt: Hunt) -> list[tuple[int, ...]]:
        """Sampled within the share of the budget, and booked on it."""
        budget = hunt.part(self.share)
        if isinstance(self.sampler, Leakage):
            return self.sampler(hunt.model, hunt.tokenizer, hunt.generator, budget=budget)
        learning, target = hunt.part(self.learning * self.share), list(hunt.goal.target_ids)
        clean, wanted = clean_and_wanted(hunt.model, hunt.tokenizer, hunt.texts, target, hunt.generator, learning)
        total = clean + wanted * self.behaviour_weight if self.behaviour_weight else clean
        return self.sampler(hunt.model, hunt.tokenizer, hunt.generator, total, budget=budget)


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """nanoGCG from its own package, with settings like ours."""

    gcg: GCG = field(default_factory=lambda: GCG(search_width=128, topk=128))
    rounds: tuple[tuple[int, int], ...] = ((3, 8), (12, 60), (8, 40))
    """(tokens in the slot, steps)"""

    def __call__(self, hunt: Hunt) -> None:
        # The peer is an optional dependency.
        from attacks.searchers import nanogcg

        behaviour, generator = hunt.goal.behaviour, hunt.generator
        nanogcg.search(hunt.engine, self.gcg, self.rounds, behaviour, generator, hunt.budget, hunt.selection)
