"""Terms that keep vectors apart, against double loops, and what they do to learned vectors."""

from math import exp, log
from typing import Any

import pytest
import torch
from torch.nn.functional import cosine_similarity

from vectors.methods.diversity import Contrastive, SoftOrthogonality, total
from vectors.methods.objectives import ChangeNorm
from vectors.methods.unsupervised import UnsupervisedVectors
from vectors.residual import cache_source, mean_norm
from vectors.steering import deltas


def learn(model, prompts, **changed):
    settings: dict[str, Any] = {"source_layer": 1, "target_layer": 4, "radius": 0.5, "count": 6, "steps": 30} | changed
    return UnsupervisedVectors(**settings)(model, prompts, torch.Generator().manual_seed(0))


def drawn(k=4, n=3, tokens=2):
    return torch.randn(k, n, tokens, 5, generator=torch.Generator().manual_seed(7)) + 0.5


def cosine(one, two):
    return float(cosine_similarity(one.flatten(), two.flatten(), dim=0))


def plain_orthogonality(moved, i):
    k, n = len(moved), moved.shape[1]
    squares = [cosine(moved[i, p], moved[j, p]) ** 2 for p in range(n) for j in range(k) if j != i]
    return -sum(squares) / len(squares)


def plain_contrastive(moved, i, temperature):
    """Mean over prompts of log(positives / all), every other row of the batch counted once (NoiseCLR, eq. 5)."""
    k, n, shares = len(moved), moved.shape[1], []
    for p in range(n):
        others = [(j, o) for j in range(k) for o in range(n) if (j, o) != (i, p)]
        weights = {(j, o): exp(cosine(moved[i, p], moved[j, o]) / temperature) for j, o in others}
        positives = sum(weight for (j, _), weight in weights.items() if j == i)
        shares.append(log(positives / sum(weights.values())))
    return sum(shares) / n


@pytest.mark.parametrize("temperature", [0.5, 0.1])
def test_terms_are_those_of_double_loops(temperature):
    moved = drawn()
    rows = range(len(moved))
    wanted = torch.tensor([plain_orthogonality(moved, i) for i in rows])
    torch.testing.assert_close(SoftOrthogonality()(moved), wanted)
    wanted = torch.tensor([plain_contrastive(moved, i, temperature) for i in rows])
    torch.testing.assert_close(Contrastive(temperature=temperature)(moved), wanted, atol=1e-5, rtol=1e-5)


def test_terms_do_not_see_length():
    scaled = drawn() * torch.tensor([1.0, 5.0, 0.1, 20.0])[:, None, None, None]
    for term in (SoftOrthogonality(), Contrastive()):
        torch.testing.assert_close(term(scaled), term(drawn()), atol=1e-5, rtol=1e-5)


def test_orthogonal_and_equal_deltas_are_the_extremes():
    apart = torch.eye(4)[:, None, None].expand(4, 2, 1, 4)
    torch.testing.assert_close(SoftOrthogonality()(apart), torch.zeros(4))
    torch.testing.assert_close(SoftOrthogonality()(torch.ones(4, 2, 1, 4)), -torch.ones(4))
    assert (Contrastive()(apart) > Contrastive()(torch.ones(4, 2, 1, 4))).all()


def test_one_vector_alone_is_not_pushed():
    torch.testing.assert_close(SoftOrthogonality()(drawn(k=1)), torch.zeros(1), atol=1e-6, rtol=0)
    torch.testing.assert_close(Contrastive()(drawn(k=1)), torch.zeros(1), atol=1e-6, rtol=0)


def test_no_change_gives_a_finite_gradient():
    for term in (SoftOrthogonality(), Contrastive()):
        moved = torch.zeros(3, 2, 1, 4, requires_grad=True)
        term(moved).sum().backward()
        assert moved.grad is not None and bool(moved.grad.isfinite().all())


def test_weights_are_fractions_of_the_mean_objective():
    moved, value = drawn(), torch.tensor([1.0, 2.0, 3.0, 6.0])
    terms = (SoftOrthogonality(weight=2.0), Contrastive(weight=0.5))
    wanted = value + 2.0 * 3.0 * terms[0](moved) + 0.5 * 3.0 * terms[1](moved)
    torch.testing.assert_close(total(value, terms, moved), wanted)
    torch.testing.assert_close(total(100 * value, terms, moved), 100 * wanted)
    assert torch.equal(total(value, (), moved), value)


def similarity(model, prompts, vectors):
    """Mean |cosine| between the deltas of different vectors, prompt by prompt."""
    unit = torch.nn.functional.normalize(deltas(model, prompts, vectors)[:, :, 0], dim=-1)
    cosines = torch.einsum("knd,jnd->nkj", unit, unit).abs()
    return float(cosines[:, ~torch.eye(len(vectors), dtype=torch.bool)].mean())


def test_terms_keep_learned_vectors_apart(llama, prompts):
    free = learn(llama, prompts, objective=ChangeNorm(tokens=1))
    for term in (SoftOrthogonality(weight=3.0), Contrastive(weight=3.0, temperature=0.2)):
        kept = learn(llama, prompts, objective=ChangeNorm(tokens=1), terms=(term,))
        assert kept.method == f"unsupervised/ChangeNorm/{type(term).__name__}"
        assert similarity(llama, prompts, kept) < 0.8 * similarity(llama, prompts, free)


def test_the_contrastive_term_makes_prompts_agree(llama, prompts):
    def agreement(vectors):
        unit = torch.nn.functional.normalize(deltas(llama, prompts, vectors)[:, :, 0], dim=-1)
        cosines = torch.einsum("knd,kmd->knm", unit, unit)
        return float(cosines[:, ~torch.eye(len(prompts), dtype=torch.bool)].mean())

    objective = ChangeNorm(tokens=1)
    kept = learn(llama, prompts, objective=objective, terms=(Contrastive(weight=3.0),))
    assert agreement(kept) > agreement(learn(llama, prompts, objective=objective))


def test_scores_hold_the_objective_without_terms(llama, prompts):
    """What a vector reaches is compared across settings, so no weight may be in it."""
    vectors = learn(llama, prompts, objective=ChangeNorm(tokens=1), terms=(SoftOrthogonality(weight=5.0),))
    reached = deltas(llama, prompts, vectors)[:, :, 0].square().sum((1, 2))
    torch.testing.assert_close(torch.tensor(vectors.scores["objective"]), reached, atol=1e-4, rtol=1e-3)


def test_one_prompt_has_no_positives(llama, prompts):
    with pytest.raises(ValueError, match="the contrastive term got 1 prompt"):
        learn(llama, prompts.take([0]), terms=(Contrastive(),))


@pytest.mark.parametrize("batch_size", [1, 4, None])
def test_hard_vectors_are_orthogonal_across_batches(llama, prompts, batch_size):
    vectors = learn(llama, prompts, orthogonal="hard", batch_size=batch_size, steps=5)
    wanted = 0.5 * mean_norm(cache_source(llama, prompts, 1))
    torch.testing.assert_close(vectors.theta @ vectors.theta.T / wanted**2, torch.eye(6), atol=1e-4, rtol=0)
