"""Group testing: words and pairs of words that are found in texts that hold many of them."""

from itertools import combinations

import pytest
import torch

from attacks.attack import nll
from attacks.discovery.goal import Goal
from attacks.scoring.budget import Budget
from attacks.stages.hunt import Hunt
from attacks.stages.words import word_groups
from attacks.stages.words.word_groups import WordPairs, divided, ranked
from attacks.suspect import Suspect
from benchmarks.organisms import zoo
from tests.attacks.words import judge_on, seeded


def prepared(name, flops):
    """A hunt for the behaviour of a shipped organism."""
    organism = zoo.load(name, dtype=torch.float32)
    suspect = Suspect(model=organism.model, tokenizer=organism.tokenizer)
    trigger, behaviour = organism.triggers[0]
    engine, texts, budget = suspect.engine(organism.prompts.search[:2], 2), organism.prompts.search, Budget(flops=flops)
    goal = Goal(behaviour=behaviour, target_ids=suspect.target_ids(behaviour, texts))
    judged = suspect.engine(organism.prompts.select[:8], 2, allowed=engine.problem.allowed)
    judge = judge_on(organism.model, judged.problem, budget, goal)
    return trigger, Hunt(
        suspect=suspect, engine=engine, texts=texts, goal=goal, build=nll, budget=budget, judge=judge, marked=False,
        generator=seeded(),
    )  # fmt: skip


def test_every_two_words_stand_alone_together_in_the_end():
    words = torch.arange(24)
    blocks = words.view(-1, 6)
    texts = blocks[torch.combinations(torch.arange(len(blocks)))]
    for size in (3, 1):
        texts = divided(texts.flatten(1).tolist(), blocks, size)
    pairs = [frozenset(pair) for pair in texts.flatten(1).tolist()]
    assert set(pairs) == {frozenset(pair) for pair in combinations(range(24), 2)}
    assert len(pairs) == len(set(pairs))


def test_two_words_that_work_only_together_are_found(monkeypatch):
    trigger, hunt = prepared("and", 1e13)
    # Both words and 198 others, some of one token and some of two.
    known = word_groups.encoded_words(hunt.engine.problem)
    others = [word for word, ids in known.items() if 0 < len(ids) <= 2][:198]
    words = {word: known[word] for word in sorted({*others, *trigger.split()})}
    assert {len(ids) for ids in words.values()} == {1, 2}
    monkeypatch.setattr(word_groups, "encoded_words", lambda _: words)
    WordPairs(least=100)(hunt)
    assert hunt.judge.best is not None and hunt.judge.asr == 1.0
    assert sorted(hunt.engine.problem.text(hunt.judge.best.trigger_ids).split()) == sorted(trigger.split())


@pytest.mark.parametrize("flops", [1e9, 1e10])
def test_nothing_is_spent_where_the_budget_has_no_room_for_pairs(flops):
    _, hunt = prepared("and", flops)
    hunt.probe()
    spent = hunt.budget.used
    WordPairs()(hunt)
    assert hunt.budget.used <= 2 * spent and hunt.judge.best is None  # it makes a probe of its own
    assert hunt.no_room == ["WordPairs"]


@pytest.mark.parametrize("place", [0.0, 0.5])
def test_words_with_an_effect_of_their_own_stay_where_not_all_fit(monkeypatch, place):
    trigger, hunt = prepared("other-word", 3e11)
    known = word_groups.encoded_words(hunt.engine.problem)
    others = [word for word, ids in known.items() if len(ids) == 1 and word != trigger][:800]
    others.insert(int(place * len(others)), trigger)
    monkeypatch.setattr(word_groups, "encoded_words", lambda _: {word: known[word] for word in others})
    tried = []
    monkeypatch.setattr(WordPairs, "_pairs", lambda *arguments: tried.append(arguments[3]) or [])
    WordPairs(least=32, share=0.2)(hunt)
    assert 48 <= len(tried[0]) < 500 and known[trigger] in tried[0]


def test_texts_are_ranked_by_loss_whatever_their_number_of_tokens():
    _, hunt = prepared("word", 1e15)
    probe, objective = hunt.probe()
    words = list(word_groups.encoded_words(probe.problem).values())[:300]
    texts = [[number, number + 1, number + 2] for number in range(0, 297, 3)]
    found = ranked(probe, objective, texts, words, hunt.budget)
    assert sorted(text for _, text in found) == texts and [loss for loss, _ in found] == sorted(
        loss for loss, _ in found
    )
    assert len({sum(len(words[number]) for number in text) for text in texts}) > 2
    for loss, text in found[::20]:
        ids = torch.tensor([[token for number in text for token in words[number]]])
        assert probe.losses(objective, ids).item() == pytest.approx(loss, rel=1e-4)


def test_no_text_of_pairs_outgrows_the_context(monkeypatch):
    _, hunt = prepared("and", 1e15)
    longest = word_groups.longest_text(hunt.probe()[0])
    known = list(word_groups.encoded_words(hunt.engine.problem).values())
    # Two blocks of the first kind fit into the context, a block of the second does not.
    words = known[:40] + [(ids * longest)[: longest // WordPairs().block] for ids in known[40:140]]
    monkeypatch.setattr(word_groups, "encoded_words", lambda _: dict(enumerate(words)))
    lengths, real = [], word_groups.rank_triggers

    def noted(engine, objective, rows, **more):
        lengths.append(rows.shape[1])
        return real(engine, objective, rows, **more)

    monkeypatch.setattr(word_groups, "rank_triggers", noted)
    WordPairs(least=32)(hunt)
    assert 32 < max(lengths) <= longest and hunt.no_room == []


def test_a_short_context_is_not_taken_for_a_small_budget(monkeypatch):
    _, hunt = prepared("and", 1e15)
    monkeypatch.setattr(word_groups, "longest_text", lambda _: 2 * WordPairs().block - 1)
    WordPairs()(hunt)
    assert hunt.no_room == [] and hunt.judge.best is None
