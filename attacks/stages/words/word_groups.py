"""Group testing: many words stand in one text, and only the texts that bring the behaviour nearer are taken apart.

A planted word mostly works wherever it stands, and two words that elicit the behaviour only together do so in any text
that holds both. A text of sixteen words takes about as long to score as three single words; it tries sixteen of them
and 120 pairs, and one of 32 words 496 pairs. Testing in groups is Dorfman's idea (1943, The detection of defective
members of large populations). An ordered phrase is not found this way: its words do little once others stand between
them.
"""

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import fmean

import torch
from jaxtyping import Int
from torch import Tensor

from attacks.scoring.budget import Budget
from attacks.scoring.engine import Engine, Objective
from attacks.scoring.planning import trigger_flops
from attacks.scoring.problem import context
from attacks.searchers.candidates import check_counts
from attacks.searchers.searcher import Found
from attacks.searchers.token_ranking import by_length, rank_triggers
from attacks.searchers.words import encoded_words
from attacks.stages.hunt import PROBE_TOKENS, Hunt

SIZE = 16
"""Words of a group in which single words are tried"""


def by_groups(
    engine: Engine,
    objective: Objective,
    words: Sequence[Sequence[int]],
    budget: Budget,
    orders: Iterable[Sequence[int]],
) -> list[int]:
    """Numbers of the words, those of the groups of lowest loss first, without those that the budget does not reach.

    Args:
        engine: whose prompts the groups are tried in.
        objective: what is to be low.
        words: token ids of each word, with the space before it.
        budget: what may be spent; the groups of fewest tokens come first.
        orders: permutations of the numbers, each of which is cut into groups; a word counts by the mean loss of its
            groups.
    """
    tokens, most = sum(map(len, words)), max(1, longest_text(engine) - max(map(len, words), default=0))
    count = max(math.ceil(len(words) / SIZE), math.ceil(tokens / most))
    losses = defaultdict[int, list[float]](list)
    for order in orders:
        for loss, group in ranked(engine, objective, alike(order, words, count), words, budget):
            for number in group:
                losses[number].append(loss)
    return sorted(losses, key=lambda number: fmean(losses[number]))


def alike(numbers: Iterable[int], words: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """The words in that order in so many groups, of about as many words and tokens each."""
    order = sorted(numbers, key=lambda number: len(words[number]))
    return [order[place::count] for place in range(count)]


def ranked(
    engine: Engine,
    objective: Objective,
    texts: Iterable[Sequence[int]],
    words: Sequence[Sequence[int]],
    budget: Budget,
) -> list[tuple[float, list[int]]]:
    """Losses of texts, the lowest first, each with its words by number, as far as the budget goes."""
    typed = {tuple(token for number in text for token in words[number]): list(text) for text in texts}
    found = list[Found]()
    for ids in by_length(typed):
        if not budget.exhausted:
            found += rank_triggers(engine, objective, ids, budget=budget)
    return [(item.loss, typed[item.trigger_ids]) for item in sorted(found, key=lambda item: item.loss)]


@dataclass(frozen=True, slots=True, kw_only=True)
class WordPairs:
    """Tries every two words in texts of two blocks of words, and halves the blocks of the best.

    Of the words of the dictionary those of fewest tokens are taken, the commonest first, twice as many as the budget
    has room for; the half stays that brings the behaviour nearer in random groups.
    """

    share: float = 0.12
    """Share of the hunt's budget, in (0, 1], that this stage may use."""
    block: int = 16
    """Words of a block; two blocks make a text."""
    draws: int = 4
    """Random groups that the effect of a word is averaged over."""
    least: int = 1000
    """Words that the budget must have room for, or the stage does nothing."""
    kept: int = 256
    """Texts of lowest loss whose blocks are halved at first; half as many each time after that."""
    tried: int = 8
    """Triggers of lowest loss that are judged by behaviour."""
    settles: int = 2
    """Tokens of the longest winner that ends the hunt (see `Hunt.settle`), if the behaviour is sure behind it."""

    def __post_init__(self):
        check_counts(self, "block", "draws", "least", "kept", "tried")

    def __call__(self, hunt: Hunt) -> None:
        (probe, objective), budget = hunt.probe(), hunt.part(self.share)
        # Two blocks of the longest of these still fit into the model's context.
        longest, least = longest_text(probe) // (2 * self.block), max(self.least, 2 * self.block)
        words = sorted((ids for ids in encoded_words(probe.problem).values() if len(ids) <= longest), key=len)
        if len(words) < least:
            return
        room = self._room(probe, words, budget)
        if budget.exhausted or room < least:
            hunt.no_room.append(type(self).__name__)
            return
        if room < len(words):
            words = words[: 2 * room]
            orders = [torch.randperm(len(words), generator=hunt.generator).tolist() for _ in range(self.draws)]
            order = by_groups(probe, objective, words, budget.of_rest(1 / 3), orders)
            words = [words[number] for number in order]
            words = words[: self._room(probe, words, budget)]
        found = self._pairs(probe, objective, words, budget)
        best = [Found(tuple(words[first] + words[second]), loss) for loss, (first, second) in found]
        hunt.show_best(best, self.tried, budget)
        hunt.settle(self.settles)

    def _pairs(
        self, engine: Engine, objective: Objective, words: list[list[int]], budget: Budget
    ) -> list[tuple[float, list[int]]]:
        """Losses and numbers of the pairs that are left in the end; none where the budget ends before."""
        most, size, kept = budget.of_rest(0.9), self.block, self.kept
        count = len(words) // size
        if count < 2:
            return []
        blocks = torch.tensor([block[:size] for block in alike(range(len(words)), words, count)])
        texts = blocks[torch.combinations(torch.arange(count))]  # `c 2 block`
        while not most.exhausted:
            found = ranked(engine, objective, texts.flatten(1).tolist(), words, most)
            if size == 1 or not found:
                return found
            size = size // 2 if size % 2 == 0 else 1
            texts = divided([text for _, text in found[:kept]], blocks, size)
            kept = max(1, kept // 2)
        return []

    def _room(self, probe: Engine, words: Sequence[Sequence[int]], budget: Budget) -> int:
        """How many of the words, the first, all pairs can be tried of, with three tenths left for what follows."""
        tokens, limit = list(accumulate(map(len, words))), 0.7 * (budget.until - budget.share)

        def cost(blocks: int) -> float:
            typed = 2 * tokens[blocks * self.block - 1] / blocks
            return blocks * (blocks - 1) / 2 * _share_of_text(probe, typed, budget)

        return self.block * bisect_right(range(1, len(words) // self.block + 1), limit, key=cost)


def longest_text(engine: Engine) -> int:
    """Tokens of the longest text that the model's context has room for in every prompt."""
    return context(engine.model) - PROBE_TOKENS - max(map(len, engine.problem.filled([])))


def _share_of_text(engine: Engine, tokens: float, budget: Budget) -> float:
    """Share of the budget that one text of so many tokens takes on all prompts of the engine."""
    return budget.share_of(trigger_flops(engine.model, engine.problem, tokens, PROBE_TOKENS))


def divided(texts: Sequence[Sequence[int]], blocks: Int[Tensor, "b block"], size: int) -> Int[Tensor, "c 2 size"]:
    """Every text of two equal parts as texts of two smaller ones, one of each part, and the neighbours of a block.

    Args:
        texts: words by number.
        blocks: words by number; two words of one block stand in no two blocks, so they are added here.
        size: words of the smaller parts.
    """
    parts = torch.tensor(texts).view(len(texts), 2, -1, size)  # `k 2 p size`
    numbers = torch.arange(parts.shape[2])
    first, second = torch.cartesian_prod(numbers, numbers).T
    crossed = torch.stack([parts[:, 0, first], parts[:, 1, second]], 2).flatten(0, 1)  # `c 2 size`
    within = blocks.reshape(-1, parts.shape[2], size)
    pairs = torch.combinations(torch.arange(within.shape[1]))
    near = within[:, pairs].flatten(0, 1)
    return torch.cat([crossed, near])
