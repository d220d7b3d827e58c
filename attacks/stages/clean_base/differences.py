"""Effects and interactions of words on the difference between suspect and clean base in early layers (K2); ours."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, groupby, product

import torch
from jaxtyping import Float
from torch import Tensor

from attacks.discovery.comparison import Comparison, Ids
from attacks.scoring.budget import Budget
from attacks.scoring.planning import forward_flops
from attacks.stages.conjunctions import interaction

Text = tuple[int, ...]
"""Words by their numbers"""

LEFT = 3
"""One word in so many is left after a first look at the effects of all"""
ROWS = 1024
"""Texts in one forward pass"""
OBSERVATIONS = 10
"""Texts per dimension of the residual that a regression needs: Harrell, Regression Modeling Strategies, 2001"""


@dataclass(frozen=True, kw_only=True)
class Differences:
    """Residuals of the suspect less those of its base, at the last token of texts that follow a prompt."""

    comparisons: Sequence[Comparison]
    """One per prompt; the first is used for tables."""
    words: Sequence[Ids]
    """Tokens of each word that texts are made of."""
    budget: Budget
    """Asked before each forward pass."""
    directions: Float[Tensor, "d_model d_model"] | None = None
    """Where given, differences are mapped by it first, so that what matters most to the behaviour is longest."""

    @property
    def layer(self) -> int:
        """After how many blocks the models are compared."""
        return self.comparisons[0].layers[-1]

    def flops(self, tokens: float) -> float:
        """Operations of reading so many tokens with both models."""
        engines = self.comparisons[0].engines
        return sum(forward_flops(engine.model, round(tokens), last=self.layer) for engine in engines)

    def typed(self, text: Text) -> Ids:
        """Its tokens."""
        return tuple(token for word in text for token in self.words[word])

    def effects(self, draws: int, generator: torch.Generator) -> list[Text]:
        """Words by the size of their effects, by turns on the token behind them and by themselves, largest first.

        All are measured beside one other word, those of largest effect, one in `LEFT`, beside more; these come first.
        None are returned where the budget ends before.

        Args:
            draws: other words that are averaged over, per prompt and place.
            generator: draws the other words.
        """
        words, rest = list(range(len(self.words))), list[int]()
        sums = [[torch.zeros(()), torch.zeros(())] for _ in self.comparisons]
        for draw in range(draws):
            for number, places in enumerate(sums):
                (other,) = torch.randint(len(self.words), (1,), generator=generator).tolist()
                for place, texts in enumerate(([(word, other) for word in words], [(other, word) for word in words])):
                    rows = self.read(texts, number)
                    if rows is None:
                        return []
                    places[place] = places[place] + (rows[0] - rows[0].mean(0))
            lengths = [(one * other).sum(-1) for one, other in zip(sums[0], sums[-1], strict=True)]
            orders = (some.argsort(descending=True).tolist() for some in lengths)
            order = list(dict.fromkeys(chain.from_iterable(zip(*orders, strict=True))))
            if draw == 0:
                left = max(1, len(order) // LEFT)
                order, rest = order[:left], [words[place] for place in order[left:]]
            words, sums = [words[place] for place in order], [[rows[order] for rows in places] for places in sums]
        return [(word,) for word in [*words, *rest]]

    def interactions(self, befores: Sequence[Text], afters: Sequence[Text], again: float) -> dict[Text, float]:
        """Of each text before with each text after; none where the budget ends before all are read.

        Args:
            befores: what the rows of the table begin with, all of as many words.
            afters: what its columns end with, all of as many words.
            again: share of the texts, those of largest interaction, that are measured once more and returned.
        """
        texts = [(*before, *after) for before, after in product(befores, afters)]
        rows = self.read(texts, 0) if texts else None
        if rows is None:
            return {}
        explained = self._explained(rows.view(2, len(befores), len(afters), -1))
        table = rows[0] - rows[1] @ explained
        beyond = interaction(table.view(len(befores), len(afters), -1)).flatten(0, 1)
        best = beyond.norm(dim=-1).topk(max(1, round(again * len(texts)))).indices
        again_read = self.read([texts[number] for number in best.tolist()], len(self.comparisons) - 1)
        if again_read is None:
            return {}
        second = again_read[0] - again_read[1] @ explained
        # The prompt moves all differences alike; what the two parts do by themselves is taken from the first one.
        first, moved = beyond[best], second - table[best]
        scores = (first * (first + moved - moved.mean(0))).sum(-1)
        return dict(zip((texts[number] for number in best.tolist()), scores.tolist(), strict=True))

    @staticmethod
    def _explained(tables: Float[Tensor, "2 befores afters d_model"]) -> Float[Tensor, "d_model d_model"]:
        """Linear map from the base's interactions to those of the differences; zero where there are too few texts."""
        differences, clean = (interaction(table).flatten(0, 1) for table in tables)
        size = tables.shape[-1]
        if len(clean) < OBSERVATIONS * size:
            return tables.new_zeros(size, size)
        return torch.linalg.lstsq(clean.T @ clean, clean.T @ differences, driver="gelsd").solution

    def read(self, texts: Sequence[Text], number: int) -> Float[Tensor, "2 texts d_model"] | None:
        """Differences, mapped, and the base's residuals on one of the prompts; None where the budget ends before."""
        comparison, typed = self.comparisons[number], list(map(self.typed, texts))
        found: Tensor | None = None
        # Texts that begin alike stand together: what they have in common is read once.
        order = sorted(range(len(typed)), key=lambda place: (len(typed[place]), typed[place]))
        for _, alike in groupby(order, key=lambda place: len(typed[place])):
            places = list(alike)
            for start in range(0, len(places), ROWS):
                if self.budget.exhausted:
                    return None
                some = places[start : start + ROWS]
                mine, clean = (each[self.layer] for each in comparison.residuals([typed[p] for p in some]))
                # Where a model overflows there is nothing to compare.
                moved = mine - clean if self.directions is None else (mine - clean) @ self.directions.to(mine.device)
                rows = torch.stack([moved, clean]).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).cpu()
                found = rows.new_empty(2, len(typed), rows.shape[-1]) if found is None else found
                found[:, some] = rows
        return found
