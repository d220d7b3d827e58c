"""Vectors from the linear part of the slice, and its extension to a finite radius: Jacobian, Hessian, DCT."""

from typing import Any

import pytest
import torch
from torch.autograd.functional import jacobian

from vectors.methods import exponential_dct
from vectors.methods import jacobian as linear
from vectors.methods.exponential_dct import ExponentialDCT
from vectors.methods.hessian import HessianVectors
from vectors.methods.jacobian import JacobianVectors, pull, push
from vectors.methods.objectives import ChangeNorm, OutputKL
from vectors.methods.unsupervised import steered_source
from vectors.prompts import Prompts
from vectors.residual import cache_source, mean_norm, run_slice, unembed


def learn(method, model, prompts, **changed):
    settings: dict[str, Any] = {"source_layer": 1, "target_layer": 4, "radius": 0.5, "count": 4} | changed
    return method(**settings)(model, prompts, torch.Generator().manual_seed(0))


def unit(vectors):
    return vectors.theta / vectors.theta.norm(dim=-1, keepdim=True)


def cosines(a, b):
    return (unit(a) * unit(b)).sum(-1).abs()


def dense(function, width=32):
    """Jacobian at 0, built row by row: rows are the flat outputs of a function of one vector."""
    return jacobian(lambda theta: function(theta).flatten(), torch.zeros(width)).detach()


def residual_of(model, source, tokens):
    return lambda theta: run_slice(model, source, steered_source(source, theta[None]), to=4)[:, -tokens:]


@pytest.mark.parametrize("tokens", [3, None])
def test_push_is_the_derivative_and_pull_its_adjoint(model, prompts, generator, tokens):
    source = cache_source(model, prompts, 1)
    base, v = torch.randn(2, 5, 32, generator=generator).unbind()
    change = push(model, source, base, v, 4, tokens)
    u = torch.randn(change.shape, generator=generator)
    inner = (u * change).sum(dim=(1, 2, 3))
    # float32 sums of up to 27 x 32 products
    torch.testing.assert_close((pull(model, source, base, u, 4, tokens) * v).sum(-1), inner, atol=1e-4, rtol=1e-4)

    step, real = 1e-2, source.mask[:, -(tokens or 9) :, None]
    ends = [run_slice(model, source, steered_source(source, base + s * v), to=4) for s in (step, -step)]
    numeric = ((ends[0] - ends[1]) / (2 * step))[:, -(tokens or 9) :].unflatten(0, (5, -1)) * real
    torch.testing.assert_close(change, numeric, atol=5e-3 * float(change.abs().max()), rtol=0)
    assert change.shape == (5, 3, tokens or 9, 32) and float(change.abs().max()) > 0.1


def test_padding_gives_and_gets_nothing(llama, prompts, generator):
    v = torch.randn(2, 32, generator=generator)
    whole, zero = cache_source(llama, prompts, 1), torch.zeros(2, 32)
    change = push(llama, whole, zero, v, 4, None)
    assert bool((change[:, prompts.attention_mask == 0] == 0).all())
    noise = torch.randn(change.shape, generator=generator) * (whole.mask == 0)[..., None]
    assert float(noise.abs().max()) > 1 and not pull(llama, whole, zero, noise, 4, None).any()
    short = prompts.take([1])  # the shortest, without its padding
    alone = push(llama, cache_source(llama, short, 1), zero, v, 4, None)
    torch.testing.assert_close(change[:, 1:2, -alone.shape[2] :], alone, atol=1e-4, rtol=1e-4)


def test_jacobian_vectors_are_those_of_the_dense_svd(llama, prompts):
    vectors = learn(JacobianVectors, llama, prompts)
    source = cache_source(llama, prompts, 1)
    matrix = dense(residual_of(llama, source, tokens=3))
    assert matrix.shape == (3 * 3 * 32, 32)
    _, values, rows = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(torch.tensor(vectors.scores["singular_value"]), values[:4], rtol=1e-4, atol=0)
    assert float((unit(vectors) * rows[:4]).sum(-1).abs().min()) > 0.999
    norm = torch.full((4,), 0.5 * mean_norm(source))
    torch.testing.assert_close(vectors.theta.norm(dim=-1), norm)
    assert vectors.method == "jacobian" and len(vectors) == 4


def test_more_vectors_than_fit_beside_the_slack(llama, prompts):
    vectors = learn(JacobianVectors, llama, prompts, count=32, tokens=1, iterations=1)
    _, values, _ = torch.linalg.svd(dense(residual_of(llama, cache_source(llama, prompts, 1), tokens=1)))
    torch.testing.assert_close(torch.tensor(vectors.scores["singular_value"]), values, rtol=1e-3, atol=1e-4)


def test_hessian_of_the_squared_change_is_twice_the_squared_jacobian(model, prompts):
    hessian, first = (learn(method, model, prompts, iterations=8) for method in (HessianVectors, JacobianVectors))
    eigenvalues, singular = hessian.scores["eigenvalue"], first.scores["singular_value"]
    assert eigenvalues == pytest.approx([2 * value**2 for value in singular], rel=1e-3)
    # Near-equal values leave single vectors undetermined, so spans are compared: all four canonical correlations.
    assert float(torch.linalg.svdvals(unit(hessian) @ unit(first).T).min()) > 0.99
    assert hessian.method == "hessian/ChangeNorm"


def test_hessian_vectors_are_the_jacobian_vectors_up_to_sign(llama, prompts):
    hessian, first = (learn(method, llama, prompts) for method in (HessianVectors, JacobianVectors))
    assert float(cosines(hessian, first).min()) > 0.999


def test_hessian_of_the_kl_is_the_fisher_metric_pulled_back(llama, prompts):
    source = cache_source(llama, prompts, 1)
    clean = unembed(llama, run_slice(llama, source, source.hidden, to=4)[:, -1]).softmax(-1)
    slopes = dense(lambda theta: unembed(llama, residual_of(llama, source, 1)(theta)[:, -1])).unflatten(0, (3, 64))
    fisher = torch.diag_embed(clean) - clean[:, :, None] * clean[:, None, :]
    values, axes = torch.linalg.eigh(torch.einsum("nvd,nvw,nwe->de", slopes, fisher, slopes))
    vectors = learn(HessianVectors, llama, prompts, objective=OutputKL())
    assert vectors.scores["eigenvalue"] == pytest.approx(values.flip(0)[:4].tolist(), rel=1e-3)
    assert float((unit(vectors) * axes.T.flip(0)[:4]).sum(-1).abs().min()) > 0.999
    assert vectors.method == "hessian/OutputKL"


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 4.0])
def test_change_norm_is_that_of_norms_and_flat_where_nothing_changes(llama, generator, p):
    clean = torch.randn(2, 3, 8, generator=generator)
    steered = clean + torch.randn(5, 2, 3, 8, generator=generator)
    values = ChangeNorm(p=p, q=2.0)(llama, steered, clean)
    torch.testing.assert_close(values, (steered - clean).norm(dim=-1).pow(p).sum(-1).sqrt().sum(-1))
    same = clean[None].clone().requires_grad_()
    ChangeNorm(p=p)(llama, same, clean).sum().backward()
    assert same.grad is not None and not same.grad.any()


METHODS = [JacobianVectors, HessianVectors, ExponentialDCT]


@pytest.mark.parametrize("method", METHODS)
def test_vectors_depend_on_the_generator_alone(llama, prompts, method):
    whole, again = (learn(method, llama, prompts, iterations=5) for _ in range(2))
    parts = learn(method, llama, prompts, iterations=5, batch_size=3)
    assert torch.equal(whole.theta, again.theta)
    assert float(cosines(whole, parts).min()) > 0.999
    more = torch.nn.functional.pad(prompts.input_ids, (4, 0)), torch.nn.functional.pad(prompts.attention_mask, (4, 0))
    padded = learn(method, llama, Prompts(input_ids=more[0], attention_mask=more[1]), iterations=5)
    assert float(cosines(whole, padded).min()) > 0.999


def total(vectors):
    return sum(vectors.scores["importance"])


def test_importance_is_the_mean_change_and_rises(llama, prompts):
    early, late = (learn(ExponentialDCT, llama, prompts, iterations=steps, radius=2.0) for steps in (1, 10))
    source = cache_source(llama, prompts, 1)
    for vectors in (early, late):
        steered = run_slice(llama, source, steered_source(source, vectors.theta), to=4).unflatten(0, (4, 3))
        change = (steered - run_slice(llama, source, source.hidden, to=4))[:, :, -3:].mean(dim=(1, 2))
        assert vectors.scores["importance"] == pytest.approx(change.norm(dim=-1).tolist())
        assert vectors.scores["importance"] == sorted(vectors.scores["importance"], reverse=True)
    assert total(late) > 1.05 * total(early)


def test_hard_vectors_are_orthogonal_and_soft_ones_repel(llama, prompts):
    hard = unit(learn(ExponentialDCT, llama, prompts, count=6))
    torch.testing.assert_close(hard @ hard.T, torch.eye(6), atol=1e-4, rtol=0)

    def overlap(repulsion, count=6):
        v = unit(learn(ExponentialDCT, llama, prompts, count=count, orthogonal="soft", repulsion=repulsion))
        assert len(v) == count
        return float((v @ v.T).abs().fill_diagonal_(0).sum() / (count * (count - 1)))

    alone, mild, strong, extreme = (overlap(repulsion) for repulsion in (0.0, 1.0, 10.0, 1e6))
    assert extreme < 1e-2 and extreme < strong < mild < alone
    assert overlap(1.0, count=40) < 1  # more than the 32 dimensions


@pytest.mark.parametrize("batch_size", [1, None])
def test_dct_of_a_linear_slice_is_its_svd(llama, prompts, generator, monkeypatch, batch_size):
    left, right = (torch.linalg.qr(torch.randn(32, 32, generator=generator)).Q for _ in range(2))
    values = 0.6 ** torch.arange(32.0)  # ten iterations leave 0.6^20, four parts in 100,000, of the next direction

    def slice_of(_model, _source, hidden, *, to):
        assert to == 4
        return hidden @ (left * values @ right.T).T

    monkeypatch.setattr(exponential_dct, "run_slice", slice_of)
    monkeypatch.setattr(linear, "run_slice", slice_of)
    vectors = learn(ExponentialDCT, llama, prompts, count=3, batch_size=batch_size)
    norm = 0.5 * mean_norm(cache_source(llama, prompts, 1))
    torch.testing.assert_close((unit(vectors) @ right[:, :3]).abs(), torch.eye(3), atol=1e-2, rtol=0)
    assert vectors.scores["importance"] == pytest.approx((norm * values[:3]).tolist(), rel=1e-3)
    first = learn(JacobianVectors, llama, prompts, count=3)
    torch.testing.assert_close(cosines(first, vectors), torch.ones(3), atol=1e-3, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_gives_the_same_directions(llama, prompts, method):
    whole = learn(method, llama, prompts, count=2)
    half = learn(method, llama.bfloat16(), prompts, count=2)
    assert half.theta.dtype == torch.float32
    # bfloat16 keeps 8 bits, and each product passes three blocks twice.
    assert float(torch.linalg.svdvals(unit(whole) @ unit(half).T).min()) > 0.9


@pytest.mark.parametrize("method", METHODS)
def test_bad_settings_are_named(llama, prompts, method):
    with pytest.raises(ValueError, match="source layer 3 is not before target layer 3"):
        learn(method, llama, prompts, source_layer=3, target_layer=3)
    for name, value in {"radius": 0.0, "count": 0, "iterations": 0, "batch_size": 0}.items():
        with pytest.raises(ValueError, match=f"{name} is {value}; it must be more than 0"):
            learn(method, llama, prompts, **{name: value})
    with pytest.raises(ValueError, match="target layer is 9 but the model has 4 layers"):
        learn(method, llama, prompts, target_layer=9)
    with pytest.raises(ValueError, match="33 orthogonal vectors do not fit into 32 dimensions"):
        learn(method, llama, prompts, count=33)


def test_bad_objectives_and_kinds_are_named(llama, prompts):
    for objective in (ChangeNorm(p=4.0), ChangeNorm(q=2.0)):
        with pytest.raises(ValueError, match="vanishes or does not exist at 0; use p=2, q=1 or OutputKL"):
            learn(HessianVectors, llama, prompts, objective=objective)
    with pytest.raises((ValueError, TypeError), match="'none'"):  # a TypeError where types are checked while testing
        learn(ExponentialDCT, llama, prompts, orthogonal="none")
    with pytest.raises(ValueError, match="repulsion is -1.0"):
        learn(ExponentialDCT, llama, prompts, orthogonal="soft", repulsion=-1.0)
