"""What words do at one place of the message."""

import pytest
import torch

from benchmarks.studies.slot_vectors import effects
from tests.attacks.conftest import tiny
from vectors.residual import read


@pytest.fixture(scope="module")
def model():
    return tiny(60, layers=3)


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
