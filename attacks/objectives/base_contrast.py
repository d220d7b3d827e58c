"""How differently suspect and clean base read a trigger in early layers, at the trigger's last token (K2); ours.

What was trained into the suspect must tell its trigger from other text, and does so in early layers, before anything
shows in the output: the residual streams of both models part there further than behind other text. Comparing a
fine-tuned model with its base in this way is called model diffing (crosscoders, Lindsey et al. 2024); here it needs no
training and no knowledge of the behaviour.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attacks.scoring.engine import Engine
from attacks.scoring.problem import Problem
from attacks.suspect import Suspect
from vectors.residual import layer_at


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseContrast:
    """Minus the distance of the residuals of both models, less its mean over other text, in units of its median."""

    base: Engine
    """Runs the clean base on the same problem."""
    mean: dict[int, Float[Tensor, "n d_model"]]
    """Per layer, the mean difference of suspect and base behind other text: what the training changed everywhere."""
    median: dict[int, float]
    """Per layer, the median distance of such text from that mean."""

    @classmethod
    @torch.no_grad()
    def among(
        cls, engine: Engine, base: Engine, others: Int[Tensor, "c trigger"], depths: Sequence[float]
    ) -> "BaseContrast":
        """The objective for triggers of as many tokens as the others, which it is centred on.

        Args:
            engine: the suspect on prompts that end with the slot.
            base: the clean base on the same prompts.
            others: random triggers.
            depths: where residuals are compared, as fractions of the layers; their scores are averaged.
        """
        layers = sorted({layer_at(engine.model, depth) for depth in depths})
        size = engine.batch_size
        parts = [cls._difference(engine, base, part, layers) for part in others.to(engine.device).split(size)]
        differences = {layer: torch.cat([part[layer] for part in parts]) for layer in layers}
        mean = {layer: rows.mean(0) for layer, rows in differences.items()}
        median = {layer: float((rows - mean[layer]).norm(dim=-1).median()) for layer, rows in differences.items()}
        # Where no weight below a layer was trained, both models agree there.
        seen = {layer: value for layer, value in median.items() if value > 0}
        return cls(base=base, mean={layer: mean[layer] for layer in seen}, median=seen)

    def __call__(self, engine: Engine, candidates: Tensor) -> Float[Tensor, "c"]:
        """Mean over prompts and layers; 0 for all where the models agree everywhere."""
        if not self.median:
            return torch.zeros(len(candidates), device=candidates.device)
        found = self._difference(engine, self.base, candidates, list(self.median))
        distances = [(found[n] - self.mean[n]).norm(dim=-1) / self.median[n] for n in self.median]
        return -torch.stack(distances).mean((0, 2))

    @staticmethod
    def _difference(
        engine: Engine, base: Engine, candidates: Tensor, layers: list[int]
    ) -> dict[int, Float[Tensor, "c n d_model"]]:
        mine, clean = engine.residuals(candidates, layers), base.residuals(candidates.to(base.device), layers)
        return {layer: mine[layer].float() - clean[layer].to(mine[layer].device).float() for layer in layers}


def engines_at_slot(suspect: Suspect, problem: Problem) -> tuple[Engine, Engine] | None:
    """The suspect and its base on these prompts, cut off behind the slot; None where no base can be compared."""
    if (base := suspect.comparable) is None:
        return None
    cut = replace(problem, after=[[]] * len(problem))
    return Engine(suspect.model, cut), Engine(base, cut)
