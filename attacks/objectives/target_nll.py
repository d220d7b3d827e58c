"""Target likelihood: how surely the model answers with the behaviour (GCG, Zou et al. 2023, arXiv:2307.15043, eq. 3).

The target's tokens are teacher-forced behind every prompt, in one pass, which gives the log-probability of each of
them, `c n target` for c candidates and n prompts; minus its mean over tokens and prompts is the loss of a candidate.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from attacks.discovery.goal import Goal
from attacks.scoring.engine import Engine

TARGET_TOKENS = 4
"""First tokens of the behaviour that attacks use as target: they tell it from other answers, and each further token
would be run for every candidate. Whether a trigger elicits the behaviour is always judged on the whole of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetNLL:
    """Negative log-likelihood of the target, nats per token, mean over prompts.

    The mellowmax of a prompt's tokens, log(mean(exp(alpha x))) / alpha (Asadi & Littman 2017, arXiv:1612.05628), lies
    between their mean (small alpha) and their maximum (large alpha), so that the least likely token counts most.
    nanoGCG applies the same operator to the negative logits of the target instead, which lack the normaliser and
    therefore also fall when the logits of all tokens rise.
    """

    target_ids: Sequence[int]
    """The behaviour as token ids."""
    reduction: Literal["mean", "mellowmax"] = "mean"
    """How the losses of the target's tokens become one."""
    alpha: float = 1.0
    """Sharpness of the mellowmax, per nat."""

    def __post_init__(self):
        if self.reduction not in ("mean", "mellowmax"):
            raise ValueError(f"reduction is {self.reduction!r}; use 'mean' or 'mellowmax'")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha is {self.alpha}; it must be positive and finite")

    @classmethod
    def from_goal(cls, _: Engine, goal: Goal, *, reduction: Literal["mean", "mellowmax"] = "mean") -> "TargetNLL":
        """On the first tokens of the behaviour."""
        return cls(target_ids=goal.target_ids[:TARGET_TOKENS], reduction=reduction)

    def __call__(self, engine: Engine, candidates: Tensor) -> Float[Tensor, "c"]:
        nll = -engine.target_logprobs(candidates, self.target_ids)
        if self.reduction == "mean":
            return nll.mean(dim=(1, 2))
        # log of a mean of exponentials over the target's tokens, without overflow: `c n`.
        soft = (self.alpha * nll).logsumexp(-1) - math.log(len(self.target_ids))
        return soft.mean(1) / self.alpha
