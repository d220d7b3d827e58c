"""How words are put together to phrases by contrast, and which texts part the replies of both models most."""

import pytest
import torch

from attacks.discovery.comparison import Comparison, Scales
from attacks.discovery.contrasted_phrases import Phrases
from attacks.discovery.contrasted_replies import _by_reply
from attacks.scoring.budget import Budget
from attacks.searchers.searcher import Found

WORDS = ["moon", "river", "stone", "garden"]


@pytest.fixture
def compared(planted_word, monkeypatch):
    """(phrases over a problem whose contrast is told by a table, the texts that were compared)."""
    organism, suspect = planted_word
    problem = suspect.engine(organism.prompts.search[:1], 2).problem
    contrasts, seen = {"stone moon": 9.0, "stone moon garden": 12.0}, list[str]()

    def ranked(_self, texts, _contrast, _budget):
        typed = [problem.text(ids).strip() for ids in texts]
        seen.extend(typed)
        return [Found(ids, -contrasts.get(text, 1.0)) for ids, text in zip(texts, typed, strict=True)]

    monkeypatch.setattr(Comparison, "ranked", ranked)
    compared = Comparison.at_slot(suspect, problem, (0.4,))
    scales = Scales(compared, problem, torch.Generator().manual_seed(0), others=4)
    words = [Found(tuple(problem.encode(word)), -2.0) for word in WORDS]
    made = Phrases(scales=scales, openings=4, following=4, alike=2, words=3, longest=8)
    return made, words, seen, problem


def test_words_that_stand_out_behind_others_go_on(compared):
    made, words, seen, problem = compared
    found = made.on(words, Budget())
    texts = [problem.text(item.trigger_ids).strip() for item in found]
    # The mean over the words: (2 + 9 + 12) / 3 and (2 + 9) / 2.
    assert texts[:2] == ["stone moon garden", "stone moon"] and [-item.loss for item in found[:2]] == [23 / 3, 5.5]
    assert not any(len(set(text.split())) < len(text.split()) for text in seen) and len(seen) == len(set(seen))
    pairs = [text.split()[0] for text in texts if len(text.split()) == 2]
    assert max(map(pairs.count, pairs)) == 2 and len(pairs) == 8
    before = len(seen)
    assert made.on(words, Budget()) == found and len(seen) == before  # nothing is compared again


def test_nothing_is_compared_without_a_budget(compared):
    made, words, seen, _ = compared
    spent = Budget()
    spent.interrupt()
    assert made.on(words, spent) == [] and not seen


def test_what_parts_the_replies_goes_first_and_without_what_stands_around_it(planted_word):
    organism, suspect = planted_word
    problem = suspect.engine(organism.prompts.search[:1], 2).problem
    trigger = organism.triggers[0][0]
    ordinary = ["the moon", "a river of stone", "likely", "trust"]
    texts = [tuple(problem.encode(text)) for text in (*ordinary, f"trust {trigger} likely", trigger)]
    ranked = [problem.text(ids).strip() for ids in _by_reply(suspect, problem, texts, Budget())]
    assert ranked[:2] == [trigger, f"trust {trigger} likely"] and sorted(ranked[2:]) == sorted(ordinary)
    spent = Budget()
    spent.interrupt()
    assert _by_reply(suspect, problem, texts, spent) == []
