"""Cosines of vectors and of their effects, and groups by them."""

import pytest
import torch
from jaxtyping import TypeCheckError

from tests.vectors.random_vectors import some_vectors
from vectors.analysis.cosines import cluster, cosine_matrix, cross_cosines, delta_cosines, theta_cosines
from vectors.prompts import Prompts
from vectors.residual import steer


def plain(model, prompts, vectors, tokens):
    """The same from one full forward pass per vector and prompt, without padding."""

    def residuals():
        rows = []
        for ids, mask in zip(prompts.input_ids, prompts.attention_mask, strict=True):
            found = model(input_ids=ids[mask.bool()][None], output_hidden_states=True).hidden_states[3]
            rows.append(found[0] if tokens is None else found[0, -tokens:])
        return torch.cat(rows).flatten()

    clean, changes = residuals(), []
    for theta in vectors.theta:
        with steer(model, 1, theta):
            changes.append(residuals() - clean)
    return torch.tensor([[float(a @ b / (a.norm() * b.norm())) for a in changes] for b in changes])


@pytest.mark.parametrize("tokens", [1, 8, None])  # 8: more than the two shorter prompts have
def test_delta_cosines_are_those_of_full_forwards(model, prompts, generator, tokens):
    for parameter in model.parameters():  # larger weights: layers that do something
        if parameter.ndim > 1:
            parameter.mul_(4)
    vectors = some_vectors(generator)
    ours = delta_cosines(model, prompts, vectors, tokens=tokens)
    torch.testing.assert_close(ours, plain(model, prompts, vectors, tokens), atol=1e-4, rtol=0)
    assert (ours - theta_cosines(vectors)).abs().max() > 1e-2


@pytest.mark.parametrize("tokens", [1, 8, None])
def test_batches_and_padding_change_nothing(llama, prompts, generator, tokens):
    vectors = some_vectors(generator)
    whole = delta_cosines(llama, prompts, vectors, tokens=tokens)
    for rows in (1, 2, 3, 7, 100):
        torch.testing.assert_close(delta_cosines(llama, prompts, vectors, tokens=tokens, batch_size=rows), whole)
    padded = Prompts(
        input_ids=torch.nn.functional.pad(prompts.input_ids, (5, 0), value=9),
        attention_mask=torch.nn.functional.pad(prompts.attention_mask, (5, 0)),
    )
    torch.testing.assert_close(delta_cosines(llama, padded, vectors, tokens=tokens), whole)


def test_zero_vectors_have_cosine_zero(llama, prompts, generator):
    vectors = some_vectors(generator)
    vectors.theta[2] = 0
    for cosines in (theta_cosines(vectors), delta_cosines(llama, prompts, vectors)):
        assert cosines[2].tolist() == cosines[:, 2].tolist() == [0.0] * 4
        torch.testing.assert_close(cosines.diagonal(), torch.tensor([1.0, 1.0, 0.0, 1.0]))
        torch.testing.assert_close(cosines, cosines.T)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])  # squares leave the range of float32
def test_cosines_do_not_depend_on_the_norm(generator, scale):
    a, b = torch.randn(3, 20, generator=generator), torch.randn(5, 20, generator=generator)
    expected = torch.nn.functional.cosine_similarity(a[:, None].double(), b[None].double(), dim=-1).float()
    torch.testing.assert_close(cross_cosines(scale * a, b), expected)
    torch.testing.assert_close(cosine_matrix(a * scale), cross_cosines(a, a))
    assert cross_cosines(a.half(), b.half()).dtype == torch.float32


def test_planted_directions_are_the_clusters(generator):
    centres = torch.linalg.qr(torch.randn(32, 3, generator=generator)).Q.T
    members = [2, 0, 1, 0, 0, 1, 2, 0, 1]
    rows = centres[members] + 0.03 * torch.randn(len(members), 32, generator=generator)
    rows = torch.cat([rows, -centres[:1]])  # the opposite of a direction is another one
    cosines = cosine_matrix(rows)
    assert cluster(cosines, 0.7) == [[1, 3, 4, 7], [2, 5, 8], [0, 6], [9]]
    assert cluster(cosines, -1.0) == [list(range(10))]
    assert cluster(torch.eye(3), 0.5) == [[0], [1], [2]] and cluster(torch.ones(1, 1), 0.5) == [[0]]
    assert cluster(torch.ones(0, 0), 0.5) == []


def test_clusters_join_by_the_mean_cosine():
    # 2 is close to 1 (0.8) and far from 0 (0.2): single linkage would join at 0.8, complete at 0.2, average at 0.5.
    cosines = torch.tensor([[1.0, 0.9, 0.2], [0.9, 1.0, 0.8], [0.2, 0.8, 1.0]])
    assert cluster(cosines, 0.51) == [[0, 1], [2]] and cluster(cosines, 0.49) == [[0, 1, 2]]


def test_bad_arguments_are_named(llama, prompts, generator):
    vectors = some_vectors(generator)
    with pytest.raises(ValueError, match="tokens is 0"):
        delta_cosines(llama, prompts, vectors, tokens=0)
    with pytest.raises(ValueError, match="batch_size 0"):
        delta_cosines(llama, prompts, vectors, batch_size=0)
    with pytest.raises((ValueError, TypeCheckError), match=r"\(2, 3\) and \(2, 4\)|2,4"):  # the hook may be first
        cross_cosines(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(ValueError, match="threshold is 1.5"):
        cluster(torch.eye(2), 1.5)
    with pytest.raises((ValueError, TypeCheckError), match=r"shape \(2, 3\)|2,3"):
        cluster(torch.ones(2, 3), 0.5)
    for bad in (torch.tensor([[1.0, 0.3], [0.9, 1.0]]), torch.full((2, 2), torch.nan)):
        with pytest.raises(ValueError, match="not symmetric or not finite"):
            cluster(bad, 0.5)
