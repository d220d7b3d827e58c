"""Vectors at one place of the message, and what words do there."""

import pytest
import torch

from benchmarks.slot_vectors import effects, learn
from tests.attacks.conftest import tiny
from vectors.prompts import Prompts
from vectors.residual import cache_source, mean_norm, read


@pytest.fixture(scope="module")
def model():
    return tiny(60, layers=3)


def test_a_vector_at_one_place_of_every_message_brings_the_target_about(model):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 60, (8, 7), generator=generator)
    source = cache_source(model, Prompts(input_ids=ids, attention_mask=torch.ones_like(ids)), 1)
    norms = mean_norm(source) * torch.tensor([[0.2], [2.0]])
    places = torch.randint(2, 6, (8,), generator=generator)
    early, late = (
        learn(model, source, places, [7], norms, steps, torch.Generator().manual_seed(1)) for steps in (1, 60)
    )
    assert torch.allclose(late[0].norm(dim=-1), norms[:, 0], rtol=1e-4)
    assert (late[1] < early[1]).all() and late[1][1] < late[1][0]


def test_effects_are_differences_from_the_mean_over_words(model):
    ids = torch.randint(5, 60, (2, 6), generator=torch.Generator().manual_seed(2))
    words = torch.tensor([9, 11, 20])
    found = effects(model, ids, words, place=4, back=1, layer=2)
    assert torch.allclose(found.mean(0), torch.zeros(32), atol=1e-5)

    def plain(word):
        changed = ids.clone()
        changed[:, 3] = word
        return read(model, input_ids=changed, attention_mask=torch.ones_like(changed), layers=[2])[2][:, 4].mean(0)

    assert torch.allclose(found[0] - found[1], plain(9) - plain(11), atol=1e-4)
