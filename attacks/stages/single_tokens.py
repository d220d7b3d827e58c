"""Every allowed token by itself as a trigger: its exact loss on one prompt, then the judge.

One forward pass per token settles the case of a trigger of one token, which a gradient search may miss. A token that
is only a part of the trigger may come out on top too, and is then dealt with by later stages.
"""

from dataclasses import dataclass

import torch

from attacks.searchers.token_ranking import rank_tokens
from attacks.stages.hunt import Hunt


@dataclass(frozen=True, slots=True, kw_only=True)
class SingleTokens:
    """Ranks all allowed tokens by their exact loss and shows the best ones to the judge."""

    share: float = 0.12
    """Share of the hunt's budget, in (0, 1], that this stage may use."""
    tried: int = 8
    """Best tokens that are judged by behaviour."""

    def __call__(self, hunt: Hunt) -> None:
        probe, objective = hunt.probe()
        # A trigger of one token, `trigger` = 1, whose only position is ranked; the 0 in it is never scored.
        empty = torch.zeros(1, dtype=torch.long)
        hunt.try_all(rank_tokens(probe, objective, empty, 0, budget=hunt.part(self.share))[: self.tried])
