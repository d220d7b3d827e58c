"""Unsupervised and supervised vectors, controls, storage, ranking."""

from typing import Any

import pytest
import torch

from vectors.analysis.behaviours import shared_openings, until_end
from vectors.generate import complete_ids, mute_tokens
from vectors.methods.controls import random_directions, random_vectors
from vectors.methods.objectives import ChangeNorm, OutputKL
from vectors.methods.supervised import SupervisedVector
from vectors.methods.unsupervised import UnsupervisedVectors
from vectors.prompts import Prompts
from vectors.residual import cache_source, mean_norm, read, steer, unembed
from vectors.steering import SteeringVectors, deltas


def learn(model, prompts, **changed):
    settings: dict[str, Any] = {"source_layer": 1, "target_layer": 4, "radius": 0.5, "count": 4, "steps": 30} | changed
    return UnsupervisedVectors(**settings)(model, prompts, torch.Generator().manual_seed(0))


def plain_objective(model, prompts, vectors, objective):
    """The same objective from full forward passes with a hook."""
    inputs = {"input_ids": prompts.input_ids, "attention_mask": prompts.attention_mask}
    clean = read(model, layers=[4], position=slice(None), **inputs)[4]
    values = []
    for theta in vectors.theta:
        with steer(model, vectors.source_layer, theta):
            steered = read(model, layers=[4], position=slice(None), **inputs)[4]
        if isinstance(objective, ChangeNorm):
            norms = (steered - clean)[:, -objective.tokens :].norm(dim=-1)
            values.append(float((norms**objective.p).sum(-1).pow(1 / objective.q).sum()))
        else:
            p, q = (unembed(model, h[:, -1]).log_softmax(-1) for h in (steered, clean))
            values.append(float((p.exp() * (p - q)).sum()))
    return values


@pytest.mark.parametrize("objective", [ChangeNorm(), ChangeNorm(p=4.0, q=2.0, tokens=2), OutputKL()])
def test_batched_objective_is_that_of_full_forwards_and_rises(llama, prompts, objective):
    early = learn(llama, prompts, objective=objective, steps=1)
    late = learn(llama, prompts, objective=objective)
    assert late.scores["objective"] == pytest.approx(plain_objective(llama, prompts, late, objective), rel=1e-3)
    assert min(late.scores["objective"]) > 1.2 * max(0.0, min(early.scores["objective"]))


def test_vectors_do_not_depend_on_the_batch(llama, prompts):
    whole, parts = learn(llama, prompts), learn(llama, prompts, batch_size=3)
    torch.testing.assert_close(whole.theta, parts.theta, atol=1e-4, rtol=1e-3)
    assert torch.equal(whole.theta, learn(llama, prompts).theta)


def test_norm_is_the_radius_and_hard_vectors_are_orthogonal(llama, prompts):
    vectors = learn(llama, prompts, orthogonal="hard", radius=0.7)
    wanted = 0.7 * mean_norm(cache_source(llama, prompts, 1))
    gram = vectors.theta @ vectors.theta.T / wanted**2
    torch.testing.assert_close(gram, torch.eye(4), atol=1e-4, rtol=0)


def test_learned_vectors_beat_random_ones(llama, prompts, generator):
    vectors = learn(llama, prompts, objective=ChangeNorm())
    random = random_vectors(vectors, generator, count=20)
    torch.testing.assert_close(random.theta.norm(dim=-1), vectors.theta.norm(dim=-1)[:1].expand(20))
    learned = deltas(llama, prompts, vectors).norm(dim=-1).mean()
    assert learned > deltas(llama, prompts, random).norm(dim=-1).mean()


def test_a_deadline_ends_learning(llama, prompts, generator):
    calls = []
    method = UnsupervisedVectors(source_layer=1, target_layer=4, radius=0.5, count=2, steps=100)
    method(llama, prompts, generator, deadline=lambda: len(calls.append(1) or calls) > 3)
    assert len(calls) == 4


def reachable_target(model, tokenizer, prompts, norm):
    """Two different tokens that some vector of this norm makes the model write after every prompt."""
    for theta in norm * random_directions(400, 32, torch.Generator().manual_seed(3)):
        ids = complete_ids(model, tokenizer, prompts, max_new_tokens=2, vectors=theta, layer=1).tolist()
        if all(row == ids[0] for row in ids) and len(set(ids[0])) == 2 and not {0, 2} & set(ids[0]):
            return ids[0]
    raise AssertionError("no vector gives both prompts the same two tokens")


def test_supervised_vector_elicits_its_target_at_the_smallest_radius(llama, tokenizer, generator):
    prompts = Prompts.from_ids([[5, 6, 7, 8], [9, 10, 11]])
    unit = mean_norm(cache_source(llama, prompts, 1))
    # A vector with this norm exists by construction, so learning must reach it there or below.
    target = reachable_target(llama, tokenizer, prompts, 2.0 * unit)
    radii = (0.01, 0.25, 0.5, 1.0, 2.0)
    vector = SupervisedVector(source_layer=1, target_layer=4, radii=radii, steps=80)(llama, prompts, target, generator)
    assert vector.scores["elicits"] == [1.0] and 0.01 < vector.radius <= 2.0
    torch.testing.assert_close(vector.theta.norm(), torch.tensor(vector.radius * unit))
    ids = complete_ids(llama, tokenizer, prompts, max_new_tokens=2, vectors=vector.theta[0], layer=1)
    assert ids.tolist() == [target] * 2
    below = tuple(radius for radius in radii if radius < vector.radius)
    method = SupervisedVector(source_layer=1, target_layer=4, radii=below, steps=80)
    missed = method(llama, prompts, target, torch.Generator().manual_seed(0))
    assert missed.scores["elicits"][0] < 0.9


def test_greedy_completion_is_that_of_transformers(model, generates, tokenizer, prompts):
    ours = complete_ids(model, tokenizer, prompts, max_new_tokens=6)
    theirs = model.generate(
        input_ids=prompts.input_ids,
        attention_mask=prompts.attention_mask,
        max_new_tokens=6,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=2,
    )[:, prompts.input_ids.shape[1] :]
    assert ours.tolist() == theirs[:, : ours.shape[1]].tolist()


def test_vectors_survive_saving(llama, prompts, tmp_path):
    vectors = learn(llama, prompts)
    vectors.save(tmp_path / "v.safetensors")
    loaded = SteeringVectors.load(tmp_path / "v.safetensors")
    assert torch.equal(loaded.theta, vectors.theta) and loaded.scores == vectors.scores
    assert loaded[1].theta.shape == (1, 32) and loaded[-1].scores["objective"] == vectors.scores["objective"][-1:]
    (tmp_path / "bad").write_text("no")
    with pytest.raises(ValueError, match="holds no steering vectors"):
        SteeringVectors.load(tmp_path / "bad")


def test_shared_openings_grow_while_most_go_on_alike(tokenizer):
    replies = [[[5, 6, 7, 8, 9], [5, 6, 7, 8]], [[5, 6, 7, 8, 3], [5, 6, 7, 4]], [[9, 9], [5, 6, 9, 9]]]
    (opening,) = shared_openings(replies, tokenizer)
    assert opening.token_ids == (5, 6, 7, 8) and opening.seen == {(0, 0), (0, 1), (1, 0)}
    assert until_end([5, 6, 2, 7], {2}) == [5, 6] and until_end([5], {2}) == [5]


def test_bad_settings_are_named(llama, prompts, generator):
    with pytest.raises(ValueError, match="source layer 3 is not before target layer 3"):
        learn(llama, prompts, source_layer=3, target_layer=3)
    with pytest.raises(ValueError, match="radius is 0"):
        learn(llama, prompts, radius=0.0)
    with pytest.raises(ValueError, match="target layer is 9 but the model has 4 layers"):
        learn(llama, prompts, target_layer=9)
    with pytest.raises(ValueError, match="33 orthogonal vectors do not fit into 32 dimensions"):
        learn(llama, prompts, count=33, orthogonal="hard")
    with pytest.raises(ValueError, match="the target has 0 tokens"):
        SupervisedVector(source_layer=1, target_layer=4)(llama, prompts, [], generator)
    other = SteeringVectors(
        theta=torch.ones(1, 8), source_layer=1, target_layer=2, radius=1.0, method="x", model_id="other"
    )
    with pytest.raises(ValueError, match="width 8 but the model has 32"):
        deltas(llama, prompts, other)


def test_prompts_of_one_token_have_a_norm_and_too_short_ones_are_named(llama, tokenizer):
    one = Prompts.from_ids([[5], [6]])
    assert mean_norm(cache_source(llama, one, 1)) > 0
    assert learn(llama, one, steps=2).theta.isfinite().all()
    with pytest.raises(ValueError, match="reads 3 positions but a prompt has 1 tokens"):
        learn(llama, one, objective=ChangeNorm())


def test_tokens_that_say_nothing_are_the_blank_the_special_and_the_last(llama, tokenizer):
    mute = mute_tokens(llama, tokenizer)
    assert set(tokenizer.all_special_ids) | {2} <= set(mute)
    texts = [tokenizer.decode([token]) for token in mute if token not in tokenizer.all_special_ids]
    assert not any(text.strip() for text in texts)
    spoken = set(range(len(tokenizer))) - set(mute)
    assert spoken and all(tokenizer.decode([token]).strip() for token in spoken)
