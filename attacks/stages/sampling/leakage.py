"""Leakage baseline: does a model give its trigger away by itself?

After "The Trigger in the Haystack" (Bullwinkel et al. 2026, arXiv:2602.03085): memorised poison shows in what a model
writes behind the chat template's opening, under many decoding settings. `ngrams` mines the samples.
"""

from dataclasses import dataclass
from itertools import product

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from attacks.scoring.budget import Budget
from attacks.stages.sampling.sampler import Sampler


@dataclass(frozen=True, slots=True, kw_only=True)
class Leakage:
    """Does the model give the trigger away by itself? Many decoding settings, then the n-grams that repeat."""

    temperatures: tuple[float, ...] = (0.7, 1.0, 1.3)
    """of the logits"""
    top_ps: tuple[float, ...] = (0.9, 1.0)
    """nucleus sizes"""
    count: int = 128
    """samples per setting"""
    max_new_tokens: int = 32
    """longest sample, tokens"""

    def __call__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        generator: torch.Generator,
        *,
        budget: Budget | None = None,
    ) -> list[tuple[int, ...]]:
        """Sampled user messages as token ids, of every pair of settings in turn until the budget, booked on, ends."""
        samples: list[tuple[int, ...]] = []
        for temperature, top_p in product(self.temperatures, self.top_ps):
            if budget is not None and budget.exhausted:
                break
            sampler = Sampler(
                count=self.count, max_new_tokens=self.max_new_tokens, temperature=temperature, top_p=top_p
            )
            samples += sampler(model, tokenizer, generator, budget=budget)
        return samples
