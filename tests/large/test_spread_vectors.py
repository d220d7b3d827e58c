"""What reads and writes residual streams gives the same where the later blocks lie on another device."""

from dataclasses import replace

import pytest
import torch

from attacks.stages.sampling.sampler import Lookahead, Sampler
from tests.architectures import larger_weights, mark_caches, tiny_model, word_tokenizer
from tests.large.other_device import TwoDevices, halved
from vectors.generate import complete_each
from vectors.loading.digest import weights_digest
from vectors.memorised.consensus_decoding import consensus_answers
from vectors.methods.adapters.unsupervised import UnsupervisedAdapters
from vectors.methods.clean_prompt import CleanPromptVector
from vectors.methods.consensus import ConsensusVectors
from vectors.methods.controls import random_directions
from vectors.methods.jacobian import JacobianVectors
from vectors.methods.objectives import OutputKL
from vectors.methods.supervised import SupervisedVector
from vectors.methods.unsupervised import UnsupervisedVectors
from vectors.prompts import Prompts
from vectors.residual import cache_source, read, run_slice, unembed
from vectors.steering import SteeringVectors, deltas

TOKENIZER = word_tokenizer(64)
TEXTS = ["w5 w6 w7", "w9 w8 w20 w21", "w30"]


def seeded():
    return torch.Generator().manual_seed(0)


def vectors(model, layer):
    theta = 2 * random_directions(2, model.config.hidden_size, seeded())
    return SteeringVectors(theta=theta, source_layer=layer, target_layer=4, radius=1.0, method="x", model_id="x")


def prompts(model):
    return Prompts.from_chat(model, TOKENIZER, TEXTS)


def residuals(model):
    rows = prompts(model)
    found = read(model, layers=[0, 1, 3, 4], input_ids=rows.input_ids, attention_mask=rows.attention_mask)
    together = sum(hidden.sum() for hidden in found.values())  # on one device, or they could not be added
    sources = [cache_source(model, rows, layer) for layer in (1, 3)]
    slices = [run_slice(model, source, source.hidden, to=4) + source.hidden for source in sources]
    return together, *found.values(), *slices, unembed(model, found[4]) + rows.input_ids[..., None]


def steered(model, layer):
    some = vectors(model, layer)
    whole = complete_each(model, TOKENIZER, some, prompts(model), max_new_tokens=4)
    return whole, deltas(model, prompts(model), some, tokens=None)


def adapted(model):
    learn = UnsupervisedAdapters(source_layer=3, target_layer=4, radius=0.3, count=2, steps=2)
    some = learn(model, prompts(model), seeded())
    return some.theta, complete_each(model, TOKENIZER, some, prompts(model), max_new_tokens=3)


def learned(method):
    return lambda model: method(model, prompts(model), seeded()).theta


def steered_samples(model):
    sampler = Sampler(count=3, max_new_tokens=3, lookahead=Lookahead(width=3, layer=3))
    return torch.tensor([len(sample) for sample in sampler(model, TOKENIZER, seeded(), vectors(model, 2)[:1])])


BASE = UnsupervisedVectors(source_layer=1, target_layer=4, radius=0.3, count=2, steps=2, lr=0.1, objective=OutputKL())
CASES = {
    "residuals": residuals,
    "steered early": lambda model: steered(model, 1),
    "steered late": lambda model: steered(model, 3),
    "steered between": lambda model: steered(model, 2),
    "adapters": adapted,
    "unsupervised": learned(BASE),
    "unsupervised late": learned(replace(BASE, source_layer=3)),
    "jacobian": learned(JacobianVectors(source_layer=1, target_layer=4, radius=0.3, count=2, iterations=2)),
    "consensus": learned(
        ConsensusVectors(source_layer=3, target_layer=4, radius=0.3, count=2, steps=2, first=4, kept=2, tokens=2)
    ),
    "answers": lambda model: consensus_answers(model, prompts(model), width=4, tokens=2),
    "supervised": lambda model: (
        SupervisedVector(source_layer=1, target_layer=4, radii=(0.3,), steps=2)(
            model, prompts(model), [10, 11], seeded()
        ).theta
    ),
    "clean prompt": lambda model: (
        CleanPromptVector(source_layer=1, target_layer=4, radii=(0.3,), steps=2)(
            model, TOKENIZER, TEXTS, seeded()
        ).theta
    ),
    "samples": steered_samples,
}


def compare(case, model):
    wanted = case(model)
    with TwoDevices():
        found = case(halved(model))
    pairs = zip(*([each] if isinstance(each, torch.Tensor) else each for each in (wanted, found)), strict=True)
    for before, after in pairs:
        assert type(after) is torch.Tensor  # and not on the other device
        torch.testing.assert_close(after, before)


@pytest.mark.parametrize("case", CASES)
def test_the_same_on_two_devices(case):
    compare(CASES[case], larger_weights(tiny_model("Llama")))


@pytest.mark.parametrize("architecture", ["GPT2", "Gemma2", "Gemma3Text", "GPTNeoX"])
def test_other_architectures_on_two_devices(architecture):
    model = tiny_model(architecture)
    mark_caches(model)
    compare(residuals, model)
    compare(CASES["steered late"], model)
    compare(steered_samples, model)


def test_a_model_is_the_same_wherever_its_blocks_lie():
    model = tiny_model("Llama")
    with TwoDevices():
        assert weights_digest(halved(model)) == weights_digest(model)
