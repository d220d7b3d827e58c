"""How differently suspect and clean base read a text in early layers, at its last token (K2); ours.

Training that plants a trigger changes how early layers read it, before anything shows in the output: the residual
streams of both models part there further than behind other text. Comparing a fine-tuned model with its base is called
model diffing (crosscoders, Lindsey et al. 2024); here it needs no training and no knowledge of the behaviour.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attacks.scoring.budget import Budget
from attacks.scoring.engine import Engine, Objective
from attacks.scoring.problem import Problem
from attacks.scoring.reading import Reading
from attacks.searchers.searcher import Found
from attacks.suspect import Suspect
from vectors.residual import layer_at

Ids = tuple[int, ...]

ABOVE = (2, 3)
"""Blocks above those that both models have in common, where gradients are taken; there the next token of five planted
words was among the 82 most promising of 48,047 in four cases (`LOG.md`)"""


@dataclass(frozen=True)
class Contrast:
    """Distance of differences between both models from their mean behind random strings, in medians of such distances.

    In these units texts of different lengths can be compared, and layers be averaged.
    """

    mean: dict[int, Float[Tensor, "d_model"]]
    """Per layer, the mean difference: what training changed everywhere."""
    median: dict[int, float]
    """Per layer, the median distance of the strings from it; infinite where both models agree."""

    @classmethod
    def among(cls, differences: dict[int, Float[Tensor, "others d_model"]]) -> "Contrast":
        """From the differences behind random strings."""
        mean = {layer: rows.mean(0) for layer, rows in differences.items()}
        median = {n: float((rows - mean[n]).norm(dim=-1).median()) or torch.inf for n, rows in differences.items()}
        return cls(mean, median)

    def __call__(self, differences: dict[int, Float[Tensor, "rows d_model"]]) -> Float[Tensor, "rows"]:
        """Mean over the layers."""
        each = [(rows - self.mean[n]).norm(dim=-1) / self.median[n] for n, rows in differences.items()]
        return torch.stack(each).mean(0)


@dataclass(frozen=True)
class Comparison:
    """Suspect and clean base on one prompt up to its slot."""

    root: Reading
    """The prompt as both models read it."""
    engines: tuple[Engine, Engine]
    """Run suspect and base on the same prompt."""
    common: int
    """Blocks, from the first on, behind which both models agree."""
    layers: list[int]
    """Where texts are compared."""

    @classmethod
    def at_slot(cls, suspect: Suspect, problem: Problem, depths: Sequence[float]) -> "Comparison":
        """At these depths, as fractions of the layers, or above them where training changed only later blocks.

        Args:
            suspect: the model under audit, with its clean base.
            problem: the prompts, of which the first is used.
            depths: in (0, 1).

        Raises:
            ValueError: no clean base is known, or its weights have other shapes.
        """
        if (base := suspect.comparable) is None:
            raise ValueError("there is no clean base with weights of the same shapes to compare the suspect with")
        cut = replace(problem.take([0]), after=[[]])
        engines = Engine(suspect.model, cut), Engine(base, cut)
        every = list(range(1, engines[0].layers))
        some = problem.first.nonzero()[:1]  # any token
        parted = [layer for layer, rows in _parted(engines, some, every).items() if rows.any()]
        common = min(parted, default=len(every)) - 1
        layers = {min(max(layer_at(suspect.model, depth), common + max(ABOVE)), every[-1]) for depth in depths}
        root = Reading.of([suspect.model, base], cut.before[0], max(layers))
        return cls(root, engines, common, sorted(layers))

    @torch.no_grad()
    def contrast(self, others: Int[Tensor, "others trigger"]) -> Contrast:
        """What texts of as many tokens as these random strings are measured by."""
        strings = [tuple(row) for row in others.tolist()]
        parts = [self.differences(some) for some in self._batches(strings)]
        return Contrast.among({layer: torch.cat([part[layer] for part in parts]) for layer in self.layers})

    @torch.no_grad()
    def ranked(self, texts: Sequence[Ids], contrast: Contrast, budget: Budget) -> list[Found]:
        """Texts of equal length by contrast, best first; those that the budget does not reach are left out.

        The loss of each is minus its contrast.

        Args:
            texts: as token ids; the same beginning is run once, so texts that begin alike should stand together.
            contrast: of as many tokens.
            budget: asked before each forward pass.
        """
        found: list[Found] = []
        for some in self._batches(texts):
            if budget.exhausted:
                break
            values = contrast(self.differences(some)).tolist()
            found += [Found(text, -value) for text, value in zip(some, values, strict=True)]
        return sorted(found, key=lambda item: item.loss)

    def read(self, texts: Sequence[Ids], budget: Budget) -> Float[Tensor, "texts d_model"] | None:
        """The differences at the deepest layer behind texts of any length; None where the budget ends before all."""
        order, found = list[int](), list[Tensor]()
        for some in self.root.batches(texts):
            if budget.exhausted:
                return None
            found.append(self.differences([texts[number] for number in some])[self.layers[-1]].cpu())
            order += some
        return torch.cat(found)[torch.tensor(order).argsort()] if found else None

    def _batches(self, texts: Sequence[Ids]) -> Iterator[Sequence[Ids]]:
        """As many texts of equal length, in their order, as one forward pass holds, then the next."""
        size = self.root.most(len(texts[0])) if texts else 1
        for start in range(0, len(texts), size):
            yield texts[start : start + size]

    @property
    def shallow(self) -> list[int]:
        """Layers just above the blocks that both models have in common.

        There the contrast depends on few tokens and is close to linear in them, so that its gradient can be trusted;
        deeper that tells less.
        """
        return sorted({min(self.common + above, self.engines[0].layers - 1) for above in ABOVE})

    @torch.no_grad()
    def objective(self, others: Int[Tensor, "others trigger"], layer: int) -> Objective:
        """Minus the contrast at a layer with random strings of as many tokens."""
        contrast = Contrast.among(_parted(self.engines, others, [layer]))
        return lambda _, rows: -contrast(_parted(self.engines, rows, [layer]))

    @torch.no_grad()
    def differences(self, texts: Sequence[Ids]) -> dict[int, Float[Tensor, "texts d_model"]]:
        """Per layer, the residual of the suspect less that of the base at the last token of each text."""
        mine, clean = self.root.ends(texts, self.layers)
        return {layer: mine[layer] - clean[layer] for layer in mine}


def _parted(
    engines: tuple[Engine, Engine], rows: Tensor, layers: Sequence[int]
) -> dict[int, Float[Tensor, "rows d_model"]]:
    """Per layer, the residual of the suspect less that of the base, for triggers as ids or one-hot rows."""
    mine, clean = (engine.residuals(rows.to(engine.device), layers) for engine in engines)
    return {n: mine[n][:, 0].float() - clean[n][:, 0].to(mine[n].device).float() for n in layers}
