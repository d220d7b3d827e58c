"""Scores of single vectors, groups of alike ones, and what stands for them."""

from dataclasses import replace

import pytest
import torch

from tests.vectors.random_vectors import some_vectors
from vectors.analysis import clusters
from vectors.analysis.clusters import cluster_vectors, completion_logprob, score_vectors
from vectors.generate import complete_each, complete_ids
from vectors.methods.controls import random_directions


def alone(model, prompts, row, reply):
    """Mean log-probability of a reply, by one forward pass without padding."""
    ids = prompts.input_ids[row][prompts.attention_mask[row].bool()].tolist()
    logits = model(input_ids=torch.tensor([ids + reply])).logits[0].log_softmax(-1)
    return torch.stack([logits[len(ids) - 1 + place, token] for place, token in enumerate(reply)]).mean()


def test_log_probability_counts_the_end_and_nothing_behind_it(model, prompts):
    completions = torch.tensor([[10, 11, 12, 13], [20, 2, 0, 0], [2, 2, 5, 0]])
    found = completion_logprob(model, prompts, completions, {2})
    wanted = [alone(model, prompts, row, reply) for row, reply in enumerate(([10, 11, 12, 13], [20, 2], [2]))]
    torch.testing.assert_close(found, torch.stack(wanted), atol=1e-4, rtol=1e-4)


def test_scores_are_shares_of_prompts(llama, tokenizer, prompts, generator, monkeypatch):
    same, mixed = [10, 11, 12, 13], [20, 21, 22, 23]
    replies = torch.tensor([[same] * 3, [mixed, same, mixed], [[2, 0, 0, 0], [7, 2, 0, 0], [7, 8, 2, 0]]])
    plain = torch.tensor([mixed, mixed, [7, 8, 2, 0]])
    monkeypatch.setattr(clusters, "complete_each", lambda *_, **__: replies)
    monkeypatch.setattr(clusters, "complete_ids", lambda *_, **__: plain)
    first, second, third = score_vectors(llama, tokenizer, some_vectors(generator, 3), prompts, batch_size=2)
    assert [score.index for score in (first, second, third)] == [0, 1, 2]
    assert (first.generality, first.distance, first.text) == (1.0, 1.0, "w10 w11 w12 w13")
    assert second.generality == pytest.approx(2 / 3) and second.text == "w20 w21 w22 w23"
    assert second.distance == pytest.approx(2 / 3)  # the first prompt's opening is that of the unsteered model
    assert third.generality == pytest.approx(1 / 3) and third.distance == pytest.approx(2 / 3) and third.text == ""
    wanted = torch.stack([alone(llama, prompts, row, same) for row in range(3)]).mean()
    assert first.coherence == pytest.approx(float(wanted), rel=1e-4)


def test_no_vector_no_distance_and_greedy_text_is_the_most_coherent(llama, tokenizer, prompts, generator):
    vectors = some_vectors(generator)
    nothing = replace(vectors, theta=0 * vectors.theta)
    settings = {"max_new_tokens": 3}
    for score in score_vectors(llama, tokenizer, nothing, prompts, **settings):
        assert score.distance == 0 and score.coherence <= 0
    whole = score_vectors(llama, tokenizer, vectors, prompts, **settings)
    parts = score_vectors(llama, tokenizer, vectors, prompts, batch_size=2, **settings)
    assert max(score.distance for score in whole) > 0
    for ours, theirs in zip(whole, parts, strict=True):
        assert ours.coherence == pytest.approx(theirs.coherence, rel=1e-4)
        assert replace(ours, coherence=0.0) == replace(theirs, coherence=0.0)
    ids = complete_ids(llama, tokenizer, prompts, max_new_tokens=1)
    best = llama(**vars_of(prompts)).logits[:, -1].log_softmax(-1).max(-1).values
    torch.testing.assert_close(completion_logprob(llama, prompts, ids, {2}), best, atol=1e-4, rtol=1e-4)


def vars_of(prompts):
    positions = (prompts.attention_mask.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": prompts.input_ids, "attention_mask": prompts.attention_mask, "position_ids": positions}


def test_alike_vectors_are_one_group_with_its_middle_for_all(llama, tokenizer, prompts, generator):
    a, b = random_directions(2, 32, generator)
    off = 0.3 * random_directions(3, 32, generator)
    theta = 2 * torch.stack([a + off[0], b, a, a + off[1], a + off[2]])
    vectors = replace(some_vectors(generator, 1), theta=theta)
    first, second = cluster_vectors(llama, tokenizer, vectors, prompts, threshold=0.7, max_new_tokens=4)
    assert first.members == (0, 2, 3, 4) and first.medoid == 2  # the others lie round it
    assert second.members == (1,) and second.medoid == 1
    ids = complete_each(llama, tokenizer, vectors[2], prompts, max_new_tokens=4)[0].tolist()
    heads = [tuple(row[:3]) for row in ids]
    common = max(heads, key=heads.count)
    assert first.text == tokenizer.decode(ids[heads.index(common)])
    groups = cluster_vectors(llama, tokenizer, vectors, prompts, threshold=1.0, max_new_tokens=4)
    assert len(groups) == 5  # no two have quite the same effect


def test_wrong_settings_are_named(llama, tokenizer, prompts, generator):
    vectors = some_vectors(generator)
    for function in (score_vectors, cluster_vectors):
        with pytest.raises(ValueError, match="batch_size is 0"):
            function(llama, tokenizer, vectors, prompts, batch_size=0)
        with pytest.raises(ValueError, match="vectors have width 31"):
            function(llama, tokenizer, replace(vectors, theta=vectors.theta[:, :31]), prompts)
        with pytest.raises(ValueError, match="max_new_tokens is 0"):
            function(llama, tokenizer, vectors, prompts, max_new_tokens=0)
    with pytest.raises(ValueError, match="threshold is 2"):
        cluster_vectors(llama, tokenizer, vectors, prompts, threshold=2.0)
