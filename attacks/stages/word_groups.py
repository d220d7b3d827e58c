"""Group testing: many words stand in one text, and only the texts that bring the behaviour nearer are taken apart.

A planted word mostly works wherever it stands, and two words that elicit the behaviour only together do so in any text
that holds both. A text of sixteen words takes about as long to score as three single words; it tries sixteen of them
and 120 pairs. Testing in groups is Dorfman's idea (1943, The detection of defective members of large populations). An
ordered phrase is not found this way: its words do little once others stand between them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

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
from attacks.searchers.words import encoded_words, whole_words
from attacks.stages.hunt import PROBE_TOKENS, Hunt

SIZE = 16
"""Words of a group in which single words are tried"""
APART = 1 / 16
"""Part of the words, those of the best groups, that the budget has to have room for one by one"""


def in_groups(engine: Engine, objective: Objective, *, budget: Budget) -> list[str]:
    """Dictionary words in the order in which they are to be tried one by one, those of the best groups first.

    There are as many, the commonest, as the budget pays for in groups and then for `APART` of them one by one. Where it
    pays for all of them one by one, they stay in their order and nothing is spent.
    """
    words = {word: ids for word, ids in encoded_words(engine.problem).items() if ids}
    typed, room = sum(map(len, words.values())) / max(1, len(words)), budget.until - budget.share
    alone, grouped = _share_of_text(engine, typed, budget), _share_of_text(engine, SIZE * typed, budget) / SIZE
    if len(words) * alone <= room or room <= 0:
        return list(words)
    some = list(words)[: int(room / (grouped + APART * alone))]
    order = by_groups(engine, objective, [words[word] for word in some], budget)
    return [some[number] for number in order]


def by_groups(engine: Engine, objective: Objective, words: Sequence[Sequence[int]], budget: Budget) -> list[int]:
    """Numbers of the words, those of the groups of lowest loss first, without those that the budget does not reach.

    Args:
        engine: whose prompts the groups are tried in.
        objective: what is to be low.
        words: token ids of each word, with the space before it.
        budget: what may be spent; the groups of fewest tokens come first.
    """
    # Every group gets as many long words as the others, so that groups have about the same length.
    order = sorted(range(len(words)), key=lambda number: len(words[number]))
    tokens = sum(map(len, words))
    most = max(1, _longest(engine) - max(map(len, words), default=0))
    count = max(math.ceil(len(words) / SIZE), math.ceil(tokens / most))
    groups = [order[number::count] for number in range(count)]
    typed = [tuple(token for number in group for token in words[number]) for group in groups]
    held, found = dict(zip(typed, groups, strict=True)), list[Found]()
    for ids in by_length(typed):
        if not budget.exhausted:
            found += rank_triggers(engine, objective, ids, budget=budget)
    return [number for item in sorted(found, key=lambda item: item.loss) for number in held[item.trigger_ids]]


@dataclass(frozen=True, slots=True, kw_only=True)
class WordPairs:
    """Tries every two of the words of one token in texts of two blocks of words, and halves the blocks of the best."""

    share: float = 0.12
    """Share of the hunt's budget, in (0, 1], that this stage may use."""
    block: int = 12
    """Words of a block; two blocks make a text."""
    least: int = 1000
    """Words that the budget must have room for, or the stage does nothing."""
    kept: int = 256
    """Texts of lowest loss whose blocks are halved."""
    tried: int = 8
    """Triggers of lowest loss that are judged by behaviour."""
    settles: int = 2
    """Tokens of the longest winner that ends the hunt (see `Hunt.settle`), if the behaviour is sure behind it."""

    def __post_init__(self):
        check_counts(self, "block", "least", "kept", "tried")

    def __call__(self, hunt: Hunt) -> None:
        (probe, objective), budget = hunt.probe(), hunt.part(self.share)
        words = whole_words(probe.problem)
        least, count = max(self.least, 2 * self.block), min(len(words), self._affordable(probe, budget))
        if len(words) < least or 2 * self.block > _longest(probe):
            return
        if budget.exhausted or count < least:
            hunt.no_room.append(type(self).__name__)
            return
        if count < len(words):
            # Those first whose effect by themselves is best, as far as a third of the budget goes.
            order = by_groups(probe, objective, words[:, None].tolist(), budget.of_rest(1 / 3))
            words = words[order][: self._affordable(probe, budget)]
        blocks = words[: len(words) // self.block * self.block].view(-1, self.block)
        texts, found = blocks[torch.combinations(torch.arange(len(blocks)))], list[Found]()  # `c 2 block`
        most, size = budget.of_rest(0.9), self.block
        while len(texts) and not most.exhausted:
            found = rank_triggers(probe, objective, texts.flatten(1), budget=most)
            if size == 1:
                break
            smaller = size // 2 if size % 2 == 0 else 1
            texts = divided([item.trigger_ids for item in found[: self.kept]], blocks, smaller)
            size = smaller
        if size == 1:
            hunt.show_best(found, self.tried, budget)
            hunt.settle(self.settles)

    def _affordable(self, probe: Engine, budget: Budget) -> int:
        """Words of which the budget pays for all pairs, with a fifth left for taking the best texts apart."""
        each = _share_of_text(probe, 2.0 * self.block, budget)
        texts = 0.8 * (budget.until - budget.share) / each if each > 0 else math.inf
        return int(self.block * min(1e6, max(0.0, 2 * texts) ** 0.5))


def _longest(engine: Engine) -> int:
    """Tokens of the longest text that the model's context has room for in every prompt."""
    return context(engine.model) - PROBE_TOKENS - max(map(len, engine.problem.filled([])))


def _share_of_text(engine: Engine, tokens: float, budget: Budget) -> float:
    """Share of the budget that one text of so many tokens takes on all prompts of the engine."""
    return budget.share_of(trigger_flops(engine.model, engine.problem, tokens, PROBE_TOKENS))


def divided(texts: Sequence[Sequence[int]], blocks: Int[Tensor, "b block"], size: int) -> Int[Tensor, "c 2 size"]:
    """Every text of two equal parts as texts of two smaller ones, one of each part, and the neighbours of a block.

    Args:
        texts: token ids, one per word.
        blocks: token ids; two words of one block stand in no two blocks, so they are added here.
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
