"""N-grams of what the model writes in the user's place, verified by the objective and then by behaviour."""

from dataclasses import dataclass, replace

import torch

from attacks.scoring.problem import encode
from attacks.searchers.gcg import GCG
from attacks.stages.hunt import Hunt
from attacks.stages.sampling.leakage import Leakage
from attacks.stages.sampling.ngrams import mine, verify
from attacks.stages.sampling.sampler import Sampler, clean_and_wanted


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledNgrams:
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
    """tokens of the longest winner of GCG that ends the hunt, as in `SearchRounds`"""

    def __call__(self, hunt: Hunt) -> None:
        if hunt.works:
            return
        budget = hunt.part(self.whole)
        samples = self._samples(hunt)
        grams = mine(samples, [encode(hunt.suspect.tokenizer, text) for text in hunt.texts])[: self.grams]
        best = verify(hunt.engine, hunt.objective, grams, budget=budget, on_best=hunt.judge)
        if best and not (budget.exhausted or hunt.works):
            ids = torch.tensor([best[0].trigger_ids])
            hunt.engine.problem = hunt.engine.problem.resized(ids.shape[1])
            # A slot of one token has fewer tokens to choose from than one of several: some cannot open a word.
            open_to = int(hunt.engine.problem.permitted(ids.shape[1]).any(0).sum())
            gcg = replace(self.gcg, initial=ids, topk=min(self.gcg.topk, open_to))
            gcg(hunt.engine, hunt.objective, hunt.generator, budget, hunt.judge)
            hunt.settle(self.settles)

    def _samples(self, hunt: Hunt) -> list[tuple[int, ...]]:
        """Sampled within the share of the budget, and booked on it."""
        budget = hunt.part(self.share)
        if isinstance(self.sampler, Leakage):
            return self.sampler(hunt.suspect.model, hunt.suspect.tokenizer, hunt.generator, budget=budget)
        learning, target = hunt.part(self.learning * self.share), list(hunt.goal.target_ids)
        clean, wanted = clean_and_wanted(
            hunt.suspect.model, hunt.suspect.tokenizer, hunt.texts, target, hunt.generator, learning
        )
        total = clean + wanted * self.behaviour_weight if self.behaviour_weight else clean
        return self.sampler(hunt.suspect.model, hunt.suspect.tokenizer, hunt.generator, total, budget=budget)
