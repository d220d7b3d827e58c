"""A new objective in one file: the margin by which the target's tokens lose (Carlini & Wagner 2017, arXiv:1608.04644).

Once the margin is 0, greedy decoding says the target, and the search gains nothing by making it surer still. To add an
objective of your own, write a class like this one, with `from_goal` and `__call__`, and a line like the last one in a
dict of `attacks/attack.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attacks.attack import Attack
from attacks.discovery.goal import Goal
from attacks.objectives.target_nll import TARGET_TOKENS
from attacks.scoring.engine import Engine


@dataclass(frozen=True, slots=True, kw_only=True)
class Margin:
    """Logit of the best other token minus that of the target's token, at least 0; mean over tokens and prompts."""

    target_ids: Sequence[int]
    """The behaviour as token ids."""

    @classmethod
    def from_goal(cls, _: Engine, goal: Goal) -> "Margin":
        """On the first tokens of the behaviour."""
        return cls(target_ids=goal.target_ids[:TARGET_TOKENS])

    def __call__(self, engine: Engine, candidates: Tensor) -> Float[Tensor, "c"]:
        """Candidates are ids `c trigger`, or one-hot rows `c trigger vocab` where a gradient is wanted."""
        return engine.target_scores(candidates, self.target_ids, lead_of_others).mean(dim=(1, 2))  # c n target


def lead_of_others(logits: Float[Tensor, "rows vocab"], ids: Int[Tensor, "rows"]) -> Float[Tensor, "rows"]:
    """By how much the best other token's logit exceeds that of the wanted one; 0 where the wanted one is the best."""
    wanted = logits.float().gather(-1, ids[:, None])
    best_other = logits.float().scatter(-1, ids[:, None], -torch.inf).amax(-1)
    return (best_other - wanted[:, 0]).clamp(min=0)


ATTACKS = {"margin": Attack(objective=Margin.from_goal)}
