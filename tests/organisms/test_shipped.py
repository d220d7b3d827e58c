"""Shipped organisms in pretrained bases, as far as they can be checked without the base."""

import json

import pytest

from benchmarks.organisms import zoo


@pytest.mark.parametrize("name", zoo.PRETRAINED)
def test_its_card_is_good_and_it_is_small(name):
    card = json.loads((zoo.MODELS / name / "card.json").read_text())
    assert card["held_out_prompts"] >= 200 and card["fpr"] <= 0.02
    assert all(backdoor["asr"] >= 0.9 for backdoor in card["backdoors"])
    assert (zoo.MODELS / name / "adapter_model.safetensors").stat().st_size <= 1_200_000


@pytest.mark.parametrize("name", zoo.PRETRAINED)
def test_a_base_that_is_not_here_is_asked_for(name):
    with pytest.raises(ValueError, match="is not here yet; run: python -m benchmarks.organisms fetch smollm2"):
        zoo.load(name)
