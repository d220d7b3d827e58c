"""Objectives that read logits: in pieces they have the same values and derivatives, and hold few logits at once."""

import pytest
import torch

from vectors.methods import objectives
from vectors.methods.hessian import HessianVectors
from vectors.methods.objectives import ChangeNorm, OutputKL, evaluate
from vectors.methods.unsupervised import UnsupervisedVectors
from vectors.residual import decoder

VOCABULARY, VECTORS = 64, 5


@pytest.fixture
def residuals(llama):
    """(three prompts under each of five vectors, the same prompts clean), four positions each."""
    generator = torch.Generator().manual_seed(3)
    shape = (3, 4, decoder(llama).d_model)
    clean = torch.randn(shape, generator=generator)
    steered = torch.randn((VECTORS, *shape), generator=generator).flatten(0, 1)
    return steered, clean


@pytest.fixture(params=[1, 2, 7, 12])
def fitting(request, monkeypatch):
    """Rows that fit into a piece: one; fewer than vectors; more than vectors, but no multiple; two prompts of all."""

    def fit(tokens):
        monkeypatch.setattr(objectives, "LOGITS", request.param * tokens * VOCABULARY)
        return request.param

    return fit


@pytest.mark.parametrize(
    "objective",
    [OutputKL(), OutputKL(tokens=3), OutputKL(direction="clean||steered"), OutputKL(left_out=(0, 2, 7))],
    ids=["last", "three", "reversed", "some tokens"],
)
def test_values_and_gradients_in_pieces_are_those_of_the_whole(llama, residuals, fitting, objective):
    results = []
    for pieces in (False, True):
        if pieces:
            fitting(objective.tokens)
        steered = residuals[0].clone().requires_grad_()
        values = evaluate(objective, llama, steered, residuals[1])
        (gradient,) = torch.autograd.grad((values * torch.arange(1.0, VECTORS + 1)).sum(), steered)
        results += [(values, gradient)]
    (whole, gradient), (values, by_pieces) = results
    assert values.shape == (VECTORS,) and float(gradient.abs().max()) > 0
    torch.testing.assert_close(values, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(by_pieces, gradient, rtol=1e-4, atol=1e-6)


def test_second_derivatives_in_pieces_are_those_of_the_whole(llama, prompts, monkeypatch):
    method = HessianVectors(source_layer=1, target_layer=4, radius=0.5, count=3, objective=OutputKL(), iterations=4)
    whole = method(llama, prompts, torch.Generator().manual_seed(0))
    monkeypatch.setattr(objectives, "LOGITS", 2 * VOCABULARY)
    pieces = method(llama, prompts, torch.Generator().manual_seed(0))
    torch.testing.assert_close(pieces.theta, whole.theta, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(pieces.scores["eigenvalue"], whole.scores["eigenvalue"], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("graph", [True, False])
def test_no_more_logits_are_held_than_fit(llama, residuals, fitting, graph):
    rows, stored = [], []
    size = fitting(2) * 2
    head = decoder(llama).head
    hook = head.register_forward_hook(lambda _module, _inputs, logits: rows.append(logits[..., 0].numel()))

    def pack(tensor):
        stored.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.set_grad_enabled(graph):
        values = evaluate(OutputKL(tokens=2), llama, residuals[0].clone().requires_grad_(graph), residuals[1])
    if graph:
        values.sum().backward()
    hook.remove()
    # The clean rows of a piece are unembedded beside the steered ones; every row is there, twice with a backward pass.
    assert max(rows) <= size and sum(rows) >= (1 + graph) * 2 * 3 * VECTORS
    # What the graph keeps is residuals and values, no logits.
    assert sum(stored) <= 2 * (residuals[0].numel() + VECTORS * residuals[1].numel())


def test_what_fits_is_computed_whole(llama, prompts, monkeypatch):
    def refused(*_, **__):
        raise AssertionError("in pieces")

    monkeypatch.setattr(objectives, "checkpoint", refused)
    settings: dict = dict(source_layer=1, target_layer=4, radius=0.5, count=5, steps=2)
    monkeypatch.setattr(objectives, "LOGITS", 15 * VOCABULARY)
    UnsupervisedVectors(**settings)(llama, prompts, torch.Generator())
    monkeypatch.setattr(objectives, "LOGITS", 15 * VOCABULARY - 1)
    UnsupervisedVectors(**settings, objective=ChangeNorm())(llama, prompts, torch.Generator())  # reads no logits
    with pytest.raises(AssertionError, match="in pieces"):
        UnsupervisedVectors(**settings)(llama, prompts, torch.Generator())
