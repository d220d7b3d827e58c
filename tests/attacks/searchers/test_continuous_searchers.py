"""PEZ, GBDA and ARCA: their own rules; what every searcher promises is in test_searchers.py."""

import torch

from attacks.scoring.engine import Engine
from attacks.searchers.arca import ARCA
from attacks.searchers.candidates import random_triggers
from attacks.searchers.gbda import gumbel
from attacks.searchers.pez import PEZ, nearest, right_inverse
from tests.attacks.words import NLL, seeded, words_only


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
