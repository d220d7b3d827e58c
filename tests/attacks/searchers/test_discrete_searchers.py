"""HotFlip, BEAST, accretion and random search: their own rules; the shared ones are in test_searchers.py."""

import itertools
from collections import Counter
from dataclasses import replace

import pytest
import torch

from attacks.objectives.target_nll import TargetNLL
from attacks.scoring.budget import Budget
from attacks.scoring.engine import Engine
from attacks.searchers.accretion import Accretion
from attacks.searchers.beast import BEAST, next_token_logits, sample_tokens
from attacks.searchers.candidates import fittest, most_promising, random_triggers
from attacks.searchers.hotflip import HotFlip
from attacks.searchers.random_search import RandomSearch
from attacks.searchers.token_ranking import rank_tokens
from tests.attacks.words import NLL, Watched, hate, seeded, spend, words_only


def test_beast_finds_the_planted_trigger_among_words(planted, tokenizer):
    problem = words_only(planted, tokenizer)
    found = BEAST(steps=2, k1=14, k2=14)(Engine(planted, problem), hate(tokenizer), seeded())
    assert problem.text(found[0].trigger_ids) == " garden rope"


@pytest.mark.parametrize("kind", [HotFlip, BEAST, Accretion, RandomSearch])
def test_a_spent_budget_is_not_overdrawn(model, problem, kind):
    engine, budget = Engine(model, problem), Budget(flops=1.0)
    spend(1.0)
    before = engine.flops
    assert kind()(engine, NLL, seeded(), budget) == [] and engine.flops == before
    assert budget.used == 1.0


def test_hotflip_with_every_token_is_coordinate_descent(model, tokenizer):
    problem = words_only(model, tokenizer)
    engine = Engine(model, problem)
    ids = random_triggers(problem.permitted(2), 1, seeded(5))[0]
    for position in range(2):
        ids = torch.tensor(rank_tokens(engine, NLL, ids, position)[0].trigger_ids)
    found = HotFlip(steps=1, topk=14)(engine, NLL, seeded(5))
    assert found[0].trigger_ids == tuple(ids.tolist())


def test_hotflip_tries_first_what_the_gradient_promises_most_of(model, tokenizer):
    """Where the loss is a sum over positions, the gradient is exact: the first token on each shortlist is the best."""
    problem, costs = words_only(model, tokenizer), torch.randn(2, len(tokenizer), generator=seeded(3)).double()

    def additive(_engine, candidates):
        if candidates.is_floating_point():
            return (candidates * costs).sum((1, 2))
        return costs[torch.arange(2), candidates].sum(1)

    found = HotFlip(steps=1, topk=1)(Engine(model, problem), additive, seeded())
    best = costs.masked_fill(~problem.permitted(2), torch.inf).argmin(-1)
    assert found[0].trigger_ids == tuple(best.tolist())


def test_hotflip_begins_anew_once_a_sweep_improves_nothing(model, problem):
    engine, watched = Engine(model, problem), Watched(NLL)
    HotFlip(steps=12, topk=8)(engine, watched, seeded())
    pairs = [set(map(tuple, ids.tolist())) for ids in watched.seen]
    # Within a run the trigger at hand is tried again at the next position; two runs share none but by chance.
    breaks = sum(not before & after for before, after in itertools.pairwise(pairs))
    assert 1 <= breaks <= 6  # a run lasts at least two of the 12 sweeps, the last of which improves nothing


def test_most_promising_are_the_permitted_tokens_of_lowest_gradient():
    gradient = torch.tensor([[3.0, -2.0, 0.0, -1.0], [0.0, 1.0, -5.0, 2.0]])
    permitted = torch.tensor([True, False, True, True])
    assert most_promising(gradient, permitted, 2).tolist() == [[3, 2], [2, 0]]
    assert sorted(most_promising(gradient, permitted, 9)[0].tolist()) == [0, 2, 3]


def test_fittest_prefers_triggers_that_retokenize(problem, tokenizer):
    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    # A space of its own would be part of the next token, were the text typed.
    rows = [ids(" ") + ids("rope")[:1], ids(" garden rope"), ids(" ") + ids("garden")[:1], ids(" river table")]
    typable = [problem.retokenizes(row) for row in rows]
    assert typable == [False, True, False, True]
    losses = torch.tensor([1.0, 2.0, 0.5, 3.0])
    assert fittest(problem, torch.tensor(rows), losses, 1)[0].tolist() == [rows[1]]
    kept, best = fittest(problem, torch.tensor(rows), losses, 3)
    assert kept.tolist() == [rows[1], rows[3], rows[2]] and best == 2.0
    kept, best = fittest(problem, torch.tensor([rows[0], rows[2]]), losses[[0, 2]], 1)
    assert kept.tolist() == [rows[2]] and best == torch.inf


def test_beast_samples_what_the_model_says_at_the_slot(model, mixed):
    engine = Engine(model, mixed)
    beams = torch.tensor([[40, 50], [60, 70]])
    booked = engine.flops
    logits = next_token_logits(engine, beams)
    executed = engine.flops - booked
    rows = torch.tensor([mixed.before[0] + beam for beam in beams.tolist()])
    torch.testing.assert_close(logits, model(rows).logits[:, -1])
    assert engine.flops_per_token * rows.numel() >= executed > 0
    permitted = mixed.permitted(3)[2]
    wanted = logits[0].masked_fill(~permitted, -torch.inf).softmax(-1)
    drawn = Counter(sample_tokens(logits[:1].expand(4000, -1), permitted, 1, seeded())[:, 0].tolist())
    # Four standard deviations of a share of 0.065 in 4000 draws are 0.016; uniform draws would be 0.05 off.
    assert max(abs(drawn[token] / 4000 - share) for token, share in enumerate(wanted.tolist())) < 0.016
    assert 0.055 < wanted.max() < 0.065
    several = sample_tokens(logits, permitted, 30, seeded())
    assert permitted[several].all() and all(len(set(row)) == 30 for row in several.tolist())


def test_beast_grows_by_one_token_from_its_best_beams_and_begins_anew(model, problem):
    watched = Watched(NLL)
    engine = Engine(model, problem.resized(3))
    BEAST(steps=4, k1=5, k2=6)(engine, watched, seeded())
    assert [tuple(ids.shape) for ids in watched.seen] == [(5, 1), (30, 2), (30, 3), (5, 1)]
    second, third = watched.seen[1:3]
    best, _ = fittest(problem, second, engine.losses(NLL, second), 5)
    assert {tuple(row) for row in third[:, :2].tolist()} == {tuple(row) for row in best.tolist()}


def test_accretion_follows_the_gradient(model, tokenizer):
    """Where the loss is a sum over tokens, the gradient is exact: one token on each shortlist is enough."""
    problem, costs = words_only(model, tokenizer), torch.randn(len(tokenizer), generator=seeded(4)).double() - 9.0

    def additive(_engine, candidates):
        return (candidates @ costs).sum(1) if candidates.is_floating_point() else costs[candidates].sum(1)

    found = Accretion(steps=2, beam=1, shortlist=1)(Engine(model, problem), additive, seeded())
    best = costs.masked_fill(~problem.allowed, torch.inf).argmin()
    assert found[0].trigger_ids == (best, best)


def test_accretion_sweeps_until_no_token_can_be_bettered(model, tokenizer):
    """On tables of random losses one sweep is not always enough, and all that are needed are made."""
    problem = words_only(model, tokenizer).resized(3)
    words = problem.allowed.nonzero()[:, 0]
    for seed in range(8):
        table = torch.rand(len(words), len(words), len(words), generator=seeded(seed))

        def loss(_engine, candidates, table=table):
            places = torch.searchsorted(words, candidates.cpu())
            if candidates.shape[1] < 3:  # shorter triggers are worse, the more so the shorter
                return 10.0 - places.shape[1] + places.sum(1) / 100
            return table[places[:, 0], places[:, 1], places[:, 2]]

        found = Accretion(steps=60, beam=1, shortlist=None)(Engine(model, problem), loss, seeded())[0]
        a, b, c = torch.searchsorted(words, torch.tensor(found.trigger_ids)).tolist()
        assert found.loss <= min(table[:, b, c].min(), table[a, :, c].min(), table[a, b].min())


def test_accretion_adds_the_best_token_in_front_or_at_the_end(model, problem):
    engine, places = Engine(model, problem), set()
    first, allowed = (mask.nonzero()[:, 0].tolist() for mask in (problem.first, problem.allowed))
    search = Accretion(steps=2, beam=1, shortlist=None)
    for target in range(300, 306):
        objective = TargetNLL(target_ids=[target])

        def best(rows, objective=objective):
            losses = engine.losses(objective, torch.tensor(rows))
            return next(tuple(rows[i]) for i in losses.argsort().tolist() if problem.retokenizes(rows[i]))

        single = best([[token] for token in first])
        pair = best([[token, *single] for token in first] + [[*single, token] for token in allowed])
        # A single token that no pair improves stays on top; no place can be told from it.
        if engine.losses(objective, torch.tensor([pair])) < engine.losses(objective, torch.tensor([single])):
            assert search(engine, objective, seeded())[0].trigger_ids == pair
            places.add(pair.index(*single))
        assert replace(search, steps=1)(engine, objective, seeded())[0].trigger_ids == single
    assert places == {0, 1}


def test_accretion_ends_where_nothing_is_left_to_chance_and_otherwise_begins_anew(model, problem):
    watched = Watched(NLL)
    exact = Accretion(steps=10**6, beam=2, shortlist=None)
    found = exact(Engine(model, problem, 4096), watched, seeded(1))
    again = Engine(model, problem)
    for position in range(2):
        ranked = rank_tokens(again, NLL, torch.tensor(found[0].trigger_ids), position)
        assert next(item for item in ranked if problem.retokenizes(item.trigger_ids)).loss >= found[0].loss - 1e-9
    watched = Watched(NLL)
    Accretion(steps=40, beam=2, shortlist=8)(Engine(model, problem, 4096), watched, seeded())
    lengths = [ids.shape[1] for ids in watched.seen]
    assert len(lengths) == 40 and 2 <= lengths.count(1) <= 10  # two choices to grow, two or more to sweep


def test_local_search_draws_exactly_some_positions_of_the_best_again(model, problem):
    problem = problem.resized(4)
    watched, best = Watched(NLL), []
    engine = Engine(model, problem, 4096)
    RandomSearch(steps=6, search_width=50, mutate=2)(
        engine, watched, seeded(), None, lambda item: bool(best.append(item))
    )
    parents = [item.trigger_ids for item in best]
    assert len(watched.seen) == 6
    for ids in watched.seen[1:]:
        differ = min((ids != torch.tensor(parent)).sum(1).max().item() for parent in parents)
        assert differ == 2
