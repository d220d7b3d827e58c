"""What every searcher promises: how far it gets, same seed same result, true finds, budgets, interrupts, errors."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import one_hot

from attacks.objectives.delta_cosine import DeltaCosine
from attacks.objectives.hybrid import Hybrid
from attacks.objectives.steered_kl import SteeredKL
from attacks.scoring.budget import Budget
from attacks.scoring.engine import Engine
from attacks.scoring.problem import SLOT, Problem
from attacks.searchers.accretion import Accretion
from attacks.searchers.arca import ARCA
from attacks.searchers.beast import BEAST
from attacks.searchers.candidates import random_triggers
from attacks.searchers.gbda import GBDA
from attacks.searchers.gcg import GCG
from attacks.searchers.hotflip import HotFlip
from attacks.searchers.pez import PEZ
from attacks.searchers.random_search import RandomSearch
from tests.attacks.words import NLL, TEXTS, Watched, hate, seeded, words_only

# These tell of every improvement and return all that they told of.
TELLING = [
    HotFlip(steps=4, topk=8, beam=2),
    BEAST(steps=4, k1=5, k2=6),
    Accretion(steps=6, beam=2, shortlist=8),
    Accretion(steps=6, beam=2, shortlist=None),
    RandomSearch(steps=4, search_width=20),
    RandomSearch(steps=4, search_width=20, mutate=1),
    PEZ(steps=8, restarts=2, lr=0.3),
    GBDA(steps=4, samples=3, draws=6, restarts=2),
    ARCA(iterations=2, averaged=3, topk=3, restarts=2),
]
# Tells of the improvements of every restart, also where another restart has done better, so it is not asked to.
GCGS = [GCG(steps=5, search_width=12, topk=12, restarts=2, patience=2)]


def label(searcher):
    return repr(searcher).replace(" ", "")


def every(searchers):
    return pytest.mark.parametrize("searcher", searchers, ids=label)


def rounds(searcher, count):
    return replace(searcher, **{"iterations" if isinstance(searcher, ARCA) else "steps": count})


def objectives(model, problem):
    """One of each kind; the wanted effect is that of a random permitted trigger, so it can be had."""
    engine = Engine(model, problem)
    goal = random_triggers(problem.permitted(problem.trigger_length), 1, seeded(9))
    with torch.no_grad():
        clean = {2: engine.residuals(goal[:, :0], [2])[2][0].float()}
        delta = {2: engine.residuals(goal, [2])[2][0].float() - clean[2]}
        steered = engine.logits(goal, 2)[0].float().log_softmax(-1)
    cosine, kl = DeltaCosine(delta=delta, clean=clean), SteeredKL(steered_logprobs=steered, layer=2)
    return {"nll": NLL, "cosine": cosine, "kl": kl, "hybrid": Hybrid(a=NLL, b=cosine)}


# BEAST and the exact accretion keep all 14 words of the first place: the others must get there by their own moves.
# ARCA tries four of them at a time: its shortlist has to be right, and 8 starts to outlive local minima.
@every(
    [
        HotFlip(steps=30, topk=8, beam=1),
        HotFlip(steps=20, topk=12, beam=3),
        BEAST(steps=2, k1=14, k2=14),
        Accretion(steps=2, beam=14, shortlist=None),
        Accretion(steps=30, beam=4, shortlist=8),
        RandomSearch(steps=30, search_width=64),
        RandomSearch(steps=30, search_width=64, mutate=2),
        ARCA(iterations=8, averaged=4, topk=4, restarts=8),
        GCG(steps=30, search_width=24, topk=12, restarts=4, patience=4),
    ]
)
def test_reaches_the_brute_force_optimum(model, tokenizer, searcher):
    problem = words_only(model, tokenizer)
    engine, tokens = Engine(model, problem), problem.allowed.nonzero()[:, 0].tolist()
    pairs = [pair for pair in itertools.product(tokens, tokens) if problem.retokenizes(pair)]
    # No single word does better than the best pair, so a shorter trigger cannot pass for it.
    best = min(engine.losses(NLL, torch.tensor(part)).min().item() for part in (pairs, [[token] for token in tokens]))
    found = searcher(engine, NLL, seeded())
    assert found[0].loss == pytest.approx(best, abs=1e-6) and len(found[0].trigger_ids) == 2
    assert [item.loss for item in found] == sorted(item.loss for item in found)


@every(
    [
        HotFlip(steps=4, topk=16),
        BEAST(steps=8, k1=8, k2=12),
        Accretion(steps=8, beam=2, shortlist=8),
        Accretion(steps=4, beam=1, shortlist=None),
        RandomSearch(steps=10, search_width=32, mutate=1),
        PEZ(steps=25, restarts=8, lr=0.3),
        GBDA(steps=12),
        ARCA(iterations=3, averaged=16, topk=16),
        GCG(steps=10, search_width=32, topk=16),
    ]
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
# (its own test gives it every word). Nor uniform draws, which meet one pair in 8,000 once the budget allows 8,000.
@every(
    [
        HotFlip(steps=15, topk=32),
        HotFlip(steps=8, topk=32, beam=4),
        Accretion(steps=8, beam=4, shortlist=None),
        Accretion(steps=20, beam=4, shortlist=32),
        RandomSearch(steps=40, search_width=128, mutate=1),
        PEZ(steps=100, restarts=4),
        GBDA(steps=60),
        ARCA(iterations=6, averaged=16, topk=10, restarts=4),
        GCG(steps=40, search_width=32, topk=32, restarts=3, patience=6),
    ]
)
def test_finds_the_planted_trigger(planted, tokenizer, searcher):
    problem = Problem.from_chat(planted, tokenizer, TEXTS, 2)
    found = searcher(Engine(planted, problem), hate(tokenizer), seeded(1))
    assert problem.text(found[0].trigger_ids) == " garden rope"


@every(TELLING + GCGS)
def test_same_seed_same_result_whatever_the_batch_size(model, tokenizer, searcher):
    # Prompts of unequal length on both sides of the slot.
    problem = words_only(model, tokenizer, [f"tell me{SLOT} about the sea", f"what is {SLOT} bread"])
    runs = [searcher(Engine(model, problem, size), NLL, seeded(3)) for size in (None, 1, 7, None)]
    for other in runs[1:3]:
        assert [item.trigger_ids for item in other] == [item.trigger_ids for item in runs[0]]
        assert [item.loss for item in other] == pytest.approx([item.loss for item in runs[0]], abs=1e-5)
    assert runs[0] == runs[3]
    # Accretion leaves little or nothing to chance among 14 words.
    assert isinstance(searcher, Accretion) or runs[0] != searcher(Engine(model, problem), NLL, seeded(4))


@every(TELLING + GCGS)
@pytest.mark.parametrize("kind", ["nll", "cosine", "kl", "hybrid"])
def test_proposals_are_permitted_and_finds_typable_and_their_loss_true(model, mixed, searcher, kind):
    problem = mixed.resized(3)
    engine, objective = Engine(model, problem), objectives(model, problem)[kind]
    watched = Watched(objective)
    found = searcher(engine, watched, seeded())
    # Mixtures too may hold weight on permitted tokens alone.
    for rows in [one_hot(ids, len(problem.allowed)) for ids in watched.seen] + watched.mixtures:
        assert not ((rows > 0) & ~problem.permitted(rows.shape[1])).any()
    assert [item.loss for item in found] == sorted(item.loss for item in found)
    for trigger_ids, loss in found:
        assert problem.retokenizes(list(trigger_ids))
        assert engine.losses(objective, torch.tensor([trigger_ids])).item() == pytest.approx(loss, abs=1e-5)
    typical = engine.losses(objective, random_triggers(problem.permitted(3), 50, seeded(5))).median()
    assert found[0].loss < typical


@every(TELLING + GCGS)
@pytest.mark.parametrize("limit", [1.0, 1e8])
def test_budget_ends_the_search_and_is_booked(model, problem, searcher, limit):
    engine = Engine(model, problem)
    start, budget = engine.flops, Budget(flops=limit)
    assert rounds(searcher, 10**6)(engine, NLL, seeded(4), budget)
    assert budget.exhausted
    assert budget.used == pytest.approx(engine.flops - start) and budget.used > 1


@every(TELLING)
def test_on_best_hears_of_every_find_and_can_stop(model, problem, searcher):
    engine, endless = Engine(model, problem), rounds(searcher, 10**6)
    for count in (1, 2):
        heard = []
        found = endless(
            engine,
            NLL,
            seeded(),
            None,
            lambda item, heard=heard, count=count: bool(heard.append(item)) or len(heard) == count,
        )
        assert found == heard[::-1] and len(found) == count


@every(TELLING)
def test_interrupt_keeps_what_was_found(model, problem, searcher):
    calls, whole = [], Budget(seconds=1e6)

    def interrupt(item):
        calls.append(item)
        if len(calls) == 2:
            raise KeyboardInterrupt

    part = whole.part(0.5)
    assert rounds(searcher, 10**6)(Engine(model, problem), NLL, seeded(), part, interrupt) == calls[::-1]
    assert whole.interrupted and whole.exhausted and part.exhausted


@every(TELLING + GCGS)
def test_empty_slot_and_no_steps(model, problem, searcher):
    with pytest.raises(ValueError, match="trigger_length is 0; give a slot of at least 1 token"):
        searcher(Engine(model, problem.resized(0)), NLL, seeded())
    with pytest.raises(ValueError, match="(steps|iterations) is 0; it must be at least 1"):
        rounds(searcher, 0)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (HotFlip, {"topk": 0, "beam": 0}),
        (BEAST, {"k1": 0, "k2": 0}),
        (Accretion, {"beam": 0, "shortlist": 0}),
        (RandomSearch, {"search_width": 0, "mutate": -1}),
        (PEZ, {"restarts": 0, "lr": 0.0, "weight_decay": -1.0}),
        (GBDA, {"samples": 0, "draws": 0, "restarts": 0, "temperature": 0.0, "lr": 0.0}),
        (ARCA, {"averaged": 0, "topk": 0, "restarts": 0}),
        (GCG, {"search_width": 0, "topk": 0, "restarts": 0, "patience": 0}),
    ],
)
def test_bad_settings(kind, settings):
    for name, value in settings.items():
        least = "at least 0" if value < 0 else "above 0" if isinstance(value, float) else "at least 1"
        with pytest.raises(ValueError, match=f"{name} is {value}; it must be {least}"):
            kind(**{name: value})


def test_settings_that_do_not_fit(model, problem):
    engine = Engine(model, problem)
    first, allowed = int(problem.first.sum()), int(problem.allowed.sum())
    for searcher, count, name in (
        (HotFlip(topk=999), allowed, "topk"),
        (Accretion(shortlist=999), allowed, "shortlist"),
        (BEAST(k1=999), first, "k1"),
        (BEAST(k2=999), allowed, "k2"),
        (ARCA(topk=999), allowed, "topk"),
        (GCG(topk=999), allowed, "topk"),
    ):
        with pytest.raises(ValueError, match=f"{name} is 999 but only {count} tokens are allowed; lower {name}"):
            searcher(engine, NLL, seeded())
    with pytest.raises(ValueError, match="mutate is 3 but the slot has 2 tokens; lower mutate"):
        RandomSearch(mutate=3)(engine, NLL, seeded())
