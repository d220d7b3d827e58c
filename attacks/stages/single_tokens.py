"""Every allowed token by itself: exact token ranking, then the judge."""

from dataclasses import dataclass

import torch

from attacks.stages.hunt import Hunt
from attacks.stages.token_ranking import rank_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class SingleTokens:
    """Every allowed token by itself, by its exact loss on one prompt."""

    share: float = 0.12
    """of the budget, at most"""
    tried: int = 8
    """best ones that are judged by behaviour"""

    def __call__(self, hunt: Hunt) -> None:
        probe, objective = hunt.probe()
        empty = torch.zeros(1, dtype=torch.long)
        hunt.try_all(rank_tokens(probe, objective, empty, 0, budget=hunt.part(self.share))[: self.tried])
