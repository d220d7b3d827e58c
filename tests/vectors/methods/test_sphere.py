"""AMSGrad on a sphere, and the log-probability of given tokens."""

from functools import partial

import pytest
import torch

from vectors.methods.sphere import ascend_on_sphere, onto_sphere, tangent
from vectors.token_logprobs import token_logprobs


def test_the_tangent_is_orthogonal_to_the_vector_and_keeps_what_already_is():
    theta, gradient = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    along = tangent(gradient, theta)
    torch.testing.assert_close((along * theta).sum(-1), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(tangent(along, theta), along)


def test_the_ascent_finds_the_maximum_of_a_linear_function_on_the_sphere():
    slope = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    theta = onto_sphere(torch.randn(3, 6, generator=torch.Generator().manual_seed(1)), 2.0).requires_grad_()
    seen = []
    ascend_on_sphere(
        lambda: (slope * theta).sum(-1), [theta], partial(onto_sphere, norm=2.0), lr=0.05, steps=300, watch=seen.append
    )
    # The maximum of <slope, theta> over norm(theta) = 2 is 2 norm(slope).
    torch.testing.assert_close((slope * theta).sum(-1).detach(), 2 * slope.norm(dim=-1), rtol=1e-2, atol=0)
    assert len(seen) == 300


def test_a_deadline_ends_the_ascent_before_its_first_step():
    theta = torch.eye(3).requires_grad_()
    ascend_on_sphere(
        lambda: theta.sum(-1), [theta], partial(onto_sphere, norm=1.0), lr=0.1, steps=5, deadline=lambda: True
    )
    assert torch.equal(theta.detach(), torch.eye(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_logprobs_are_those_of_cross_entropy_in_float32(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 5, 11, generator=generator).to(dtype)
    ids = torch.randint(11, (4, 5), generator=generator)
    wanted = -torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids.flatten(), reduction="none")
    assert torch.equal(token_logprobs(logits, ids), wanted.unflatten(0, (4, 5)))
