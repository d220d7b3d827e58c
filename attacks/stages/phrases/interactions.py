"""Effects and interactions of words on the residual of the suspect, or on its difference from the base; ours."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, product

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attacks.discovery.comparison import Comparison, Ids
from attacks.scoring.budget import Budget
from attacks.scoring.planning import forward_flops
from attacks.scoring.problem import Problem
from attacks.scoring.reading import Reading
from attacks.stages.conjunctions import interaction
from attacks.stages.phrases.changed_words import BLOCKS, by_change
from attacks.stages.phrases.estimates import lengths, lengths_flops
from attacks.suspect import Suspect
from vectors.residual import layer_at

Text = tuple[int, ...]
"""Words by their numbers"""

HALF = 0.5
"""Share of the explained that is taken off where no base is known: all of it raises one of three planted pairs from
1,492nd to eighth of 2.6 million and lowers another from 57th to 1,158th, half leaves them 78th and 36th (`LOG.md`)"""
SAMPLE, SAMPLED = 32, 2**16
"""Texts that each mean is taken over, and all means together, where not all are read"""
ANCHORS = 4
"""Texts in the place of the first part, where gradients are taken for estimates"""
ESTIMATED = 8
"""Directions that estimates are made of: the cost is proportional to them"""
TABLE = 8192
"""Texts of a table that are read before the next ones"""
OBSERVATIONS = 10
"""Texts per dimension that a regression needs: Harrell, Regression Modeling Strategies, 2001"""


@dataclass(frozen=True, kw_only=True)
class Interactions:
    """Reads texts behind prompts: what is measured at the last token of each, and what is known to explain some of it.

    Where the clean base is known, that is the difference of both residuals, and the residual of the base. Otherwise it
    is the residual of the suspect, and the same half as deep.
    """

    roots: Sequence[Reading]
    """The prompts, as the suspect, and the base where it is known, read them; the first is used for tables."""
    layer: int
    """After how many blocks texts are read."""
    words: Sequence[Ids]
    """Tokens of each word that texts are made of; where no base is known, then the last tokens of words that are no
    words themselves."""
    budget: Budget
    """Asked before each forward pass."""
    common: int = 0
    """Blocks, from the first on, behind which suspect and base agree."""
    pieces: int = 0
    """How many these are."""
    directions: Float[Tensor, "d_model k"] | None = None
    """Where given, all that is read is mapped by it first, so that what matters most to the behaviour is longest."""

    @classmethod
    def behind(
        cls, problem: Problem, suspect: Suspect, depth: float, words: Sequence[Ids], budget: Budget
    ) -> "Interactions":
        """Behind each of these prompts, at a depth as a fraction of the layers.

        With the base known that is where training has changed it, if that is deeper.
        """
        each = [problem.take([number]) for number in range(len(problem))]
        if suspect.comparable is None:
            layer = layer_at(suspect.model, depth)
            roots = [Reading.of([suspect.model], one.before[0], layer) for one in each]
            known = {*words}
            ends = dict.fromkeys(word[-1:] for word in words if word[-1:] not in known)
            return cls(roots=roots, layer=layer, words=[*words, *ends], pieces=len(ends), budget=budget)
        comparisons = [Comparison.at_slot(suspect, one, [depth]) for one in each]
        roots, layer = [comparison.root for comparison in comparisons], comparisons[0].layers[-1]
        common = comparisons[0].common
        return cls(roots=roots, layer=layer, words=words, common=common, budget=budget)

    @property
    def compared(self) -> bool:
        """Whether the suspect is compared with its base."""
        return len(self.roots[0].models) > 1

    def flops(self, tokens: int | float) -> float:
        """Operations of reading so many tokens."""
        return sum(forward_flops(model, round(tokens), last=self.layer) for model in self.roots[0].models)

    def likely_flops(self, befores: Sequence[Text], afters: Sequence[Text], most: int) -> float:
        """Operations of `likely` of these texts."""
        first, last = ([*map(self.typed, texts)] for texts in (befores, afters))
        before, after = (sum(map(len, texts)) for texts in (first, last))
        if not before or not after:
            return 0.0
        if self.roots[0].prefixes[0].layers is None:
            return self.flops(len(first) * after)
        groups, among = _by_length(first), _by_length(last)
        estimated = sum(
            lengths_flops(self.roots[0], (len(a), len(b)), sizes, _anchors(len(groups)), self.layer, ESTIMATED)
            for a, b in product(groups, among)
            for sizes in [(len(first[a[0]]), len(last[b[0]]))]
        )
        means = _sampled(last) * after + _sampled(first) * len(first) * after / len(last)
        # What texts begin with is read once.
        return estimated + self.flops(means + 2 * before + min(most, len(first) * len(last)) * after / len(last))

    def whole(self) -> list[Text]:
        """All words."""
        return [(number,) for number in range(len(self.words) - self.pieces)]

    def typed(self, text: Text) -> Ids:
        """Its tokens."""
        return tuple(token for word in text for token in self.words[word])

    def changed(self) -> list[Text]:
        """All words, those first that training changed most; none where the budget ends before, or without the base."""
        blocks = range(self.common, min(self.common + BLOCKS, self.layer))
        return [(number,) for number in by_change(self.roots[0], self.words, blocks, self.budget)]

    def interactions(self, befores: Sequence[Text], afters: Sequence[Text], again: float) -> dict[Text, float]:
        """Of each text before with each text after; none where the budget ends before all are read.

        The score is a squared length. With the base known, what a regression on the base's interactions explains is
        taken off; without it, half of what one on interactions half as deep explains: some planted pairs are long there
        too, others among the shortest (`HALF`).

        Args:
            befores: what the rows of the table begin with, all of as many words.
            afters: what its columns end with, all of as many words.
            again: share of the texts, those of largest interaction, that are returned; with the base known they are
                measured once more, on the last prompt.
        """
        rows = self._table(befores, afters)
        if rows is None:
            return {}
        table = torch.stack([interaction(each.view(len(befores), len(afters), -1)).flatten(0, 1) for each in rows])
        explained = _explained(table) * (1.0 if self.compared else HALF)
        beyond = table[0] - table[1] @ explained
        best = beyond.norm(dim=-1).topk(max(1, round(again * len(beyond)))).indices
        first = beyond[best]
        texts = [(*befores[place // len(afters)], *afters[place % len(afters)]) for place in best.tolist()]
        if self.compared:
            second = self.read(texts, len(self.roots) - 1)
            if second is None:
                return {}
            # The prompt moves all alike; what the two parts do by themselves is taken from the first one.
            moved = second - rows[:, best]
            moved = moved[0] - moved[1] @ explained
            scores = (first * (first + moved - moved.mean(0))).sum(-1)
        else:
            scores = first.pow(2).sum(-1)
        return dict(zip(texts, scores.tolist(), strict=True))

    def likely(
        self, befores: Sequence[Text], afters: Sequence[Text], most: int, again: float, generator: torch.Generator
    ) -> dict[Text, float]:
        """Of each text before with each text after, where no base is known; scores as those of `interactions`.

        Those of largest estimate to first order are read, and each text beside a sample of the others, so that the
        means of rows and columns are known. Of a model that keeps something else than keys and values all are read.

        Args:
            befores: at least one, all of as many words.
            afters: at least one, all of as many words.
            most: texts of largest estimate that are read.
            again: as for `interactions`, of a model all texts of which are read.
            generator: draws the samples.
        """
        if self.roots[0].prefixes[0].layers is None or self.directions is None:
            return self.interactions(befores, afters, again)
        estimates = self._estimates(befores, afters, generator).flatten()
        best = estimates.topk(min(most, len(estimates))).indices
        return self.chosen(befores, afters, best, generator)

    def chosen(
        self, befores: Sequence[Text], afters: Sequence[Text], numbers: Int[Tensor, "n"], generator: torch.Generator
    ) -> dict[Text, float]:
        """Of some texts of a table, by row times columns plus column; scores as those of `interactions`.

        Each text before and after is read beside a sample of the others, so that the means of rows and columns are
        known. None are returned where the budget ends before.
        """
        rows, columns = len(befores), len(afters)
        first = torch.randperm(rows, generator=generator)[: _sampled(afters)]
        last = torch.randperm(columns, generator=generator)[: _sampled(befores)]
        behind = self._table([befores[number] for number in first.tolist()], afters)
        before = self._table(befores, [afters[number] for number in last.tolist()])
        if behind is None or before is None:
            return {}
        behind, before = behind.view(2, len(first), columns, -1), before.view(2, rows, len(last), -1)
        explained = _explained(torch.stack([interaction(each).flatten(0, 1) for each in behind])) * HALF
        texts = [(*befores[place // columns], *afters[place % columns]) for place in numbers.tolist()]
        read = self.read(texts, 0)
        if read is None:
            return {}
        means = before.mean(2)[:, numbers // columns] + behind.mean(1)[:, numbers % columns]
        beyond = read - means + behind[:, :, last].mean((1, 2))[:, None]
        scores = (beyond[0] - beyond[1] @ explained).square().sum(-1)
        return dict(zip(texts, scores.tolist(), strict=True))

    def _estimates(
        self, befores: Sequence[Text], afters: Sequence[Text], generator: torch.Generator
    ) -> Float[Tensor, "befores afters"]:
        """Of the lengths of interactions; zero from where the budget ends on."""
        assert self.directions is not None
        first, last = ([*map(self.typed, texts)] for texts in (befores, afters))
        found, groups, among = torch.zeros(len(first), len(last)), _by_length(first), _by_length(last)
        for some in groups:
            drawn = torch.randperm(len(some), generator=generator)[: _anchors(len(groups))]
            anchors = [first[some[number]] for number in drawn.tolist()]
            for others in among:
                found[torch.tensor(some)[:, None], torch.tensor(others)] = lengths(
                    self.roots[0], [first[number] for number in some], [last[number] for number in others], anchors,
                    self.layer, self.directions[:, -ESTIMATED:], self.budget,
                )  # fmt: skip
        return found

    def _table(self, befores: Sequence[Text], afters: Sequence[Text]) -> Float[Tensor, "2 texts k"] | None:
        """Each text before with each text after, as `read` returns them."""
        found, size = None, max(1, TABLE // max(1, len(afters)))
        for start in range(0, len(befores) if afters else 0, size):
            texts = [(*before, *after) for before, after in product(befores[start : start + size], afters)]
            rows = self.read(texts, 0)
            if rows is None:
                return None
            if found is None:
                found = rows.new_empty(2, len(befores) * len(afters), rows.shape[-1])
            found[:, start * len(afters) : start * len(afters) + len(texts)] = rows
        return found

    def read(self, texts: Sequence[Text], number: int) -> Float[Tensor, "2 texts k"] | None:
        """What is measured behind one of the prompts, and what explains some; None where the budget ends before."""
        typed, layers = list(map(self.typed, texts)), [self.layer]
        if not self.compared:
            layers.append((self.layer + 1) // 2)
        found: Tensor | None = None
        for some in self.roots[number].batches(typed):
            if self.budget.exhausted:
                return None
            mine, *clean = self.roots[number].ends([typed[p] for p in some], layers)
            late, known = mine[self.layer], clean[0][self.layer] if clean else mine[layers[-1]]
            # Where a model overflows there is nothing to compare.
            rows = torch.stack([late - known if clean else late, known])
            if self.directions is not None:
                rows = rows @ self.directions.to(rows.device)
            rows = rows.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).cpu()
            found = rows.new_empty(2, len(typed), rows.shape[-1]) if found is None else found
            found[:, some] = rows
        return found


def _sampled(texts: Sequence[object]) -> int:
    """Beside how many others each of these texts is read for its mean."""
    return max(1, min(SAMPLE, SAMPLED // len(texts)))


def _anchors(groups: int) -> int:
    """Of each group of first parts of equal length, where gradients are taken."""
    return max(1, ANCHORS // groups)


def _by_length(typed: Sequence[Ids]) -> list[list[int]]:
    """Places of texts of equal length."""
    order = sorted(range(len(typed)), key=lambda place: len(typed[place]))
    return [list(alike) for _, alike in groupby(order, key=lambda place: len(typed[place]))]


def _explained(table: Float[Tensor, "2 texts k"]) -> Float[Tensor, "k k"]:
    """Linear map from the interactions of what explains to those of what is measured; zero for too few texts."""
    size = table.shape[-1]
    if table.shape[1] < OBSERVATIONS * size:
        return table.new_zeros(size, size)
    return torch.linalg.lstsq(table[1].T @ table[1], table[1].T @ table[0], driver="gelsd").solution
