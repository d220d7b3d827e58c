"""Difference of means: against a plain computation, against padding, and in what it refuses."""

import math

import pytest
import torch

from vectors.methods.mean_difference import MeanDifference, cohens_d
from vectors.prompts import Prompts
from vectors.residual import cache_source, mean_norm, steer

POSITIVE = [[5, 6, 7, 8, 9], [10, 11, 12], [13, 14, 15, 16]]
NEGATIVE = [[20, 21, 22, 23], [24, 25]]


def mean_residual(model, rows, layer, tokens):
    """One unpadded prompt after another, read by transformers itself."""
    means = []
    for row in rows:
        hidden = model(input_ids=torch.tensor([row]), output_hidden_states=True).hidden_states[layer][0]
        means.append(hidden[-tokens:].mean(0))
    return torch.stack(means).mean(0)


@pytest.mark.parametrize("tokens", [1, 3])
def test_it_is_the_plain_difference_of_means(model, tokens):
    method = MeanDifference(source_layer=2, target_layer=4, tokens=tokens)
    negative = Prompts.from_ids(NEGATIVE)  # one of them has fewer than three tokens
    vectors = method(model, Prompts.from_ids(POSITIVE), negative)
    wanted = mean_residual(model, POSITIVE, 2, tokens) - mean_residual(model, NEGATIVE, 2, tokens)
    torch.testing.assert_close(vectors.theta, wanted[None], atol=1e-5, rtol=1e-4)
    assert vectors.scores["norm"] == pytest.approx([float(wanted.norm())], rel=1e-4)
    unit = mean_norm(cache_source(model, negative, 2))
    assert vectors.radius == pytest.approx(float(wanted.norm()) / unit, rel=1e-4)


def test_padding_never_counts(llama):
    method = MeanDifference(source_layer=1, target_layer=4, tokens=4)
    plain = method(llama, Prompts.from_ids(POSITIVE), Prompts.from_ids(NEGATIVE))
    sets = []
    for rows in (POSITIVE, NEGATIVE):
        prompts = Prompts.from_ids(rows)
        wide = torch.full((len(rows), 3), 33)
        sets.append(
            Prompts(
                input_ids=torch.cat([wide, prompts.input_ids], dim=1),
                attention_mask=torch.cat([0 * wide, prompts.attention_mask], dim=1),
            )
        )
    padded = method(llama, *sets)
    torch.testing.assert_close(padded.theta, plain.theta, atol=1e-5, rtol=1e-4)
    assert padded.radius == pytest.approx(plain.radius, rel=1e-5)


def test_a_radius_rescales_and_nothing_else(llama):
    positive, negative = Prompts.from_ids(POSITIVE), Prompts.from_ids(NEGATIVE)
    own = MeanDifference(source_layer=1, target_layer=4)(llama, positive, negative)
    scaled = MeanDifference(source_layer=1, target_layer=4, radius=0.4)(llama, positive, negative)
    assert scaled.radius == 0.4 and scaled.scores == own.scores
    torch.testing.assert_close(scaled.theta.norm(), torch.tensor(0.4 * mean_norm(cache_source(llama, negative, 1))))
    torch.testing.assert_close(scaled.theta / 0.4, own.theta / own.radius)


def test_adding_it_to_the_negative_prompts_gives_the_positive_mean(llama):
    positive, negative = Prompts.from_ids(POSITIVE), Prompts.from_ids(NEGATIVE)
    vectors = MeanDifference(source_layer=2, target_layer=4)(llama, positive, negative)
    with steer(llama, 2, vectors.theta[0]):
        shifted = mean_residual(llama, NEGATIVE, 2, 1)
    torch.testing.assert_close(shifted, mean_residual(llama, POSITIVE, 2, 1), atol=1e-4, rtol=1e-4)


def test_separation_is_cohens_d(llama):
    # Means 4 and 1, squared deviations 2 and 2 over 3 + 3 - 2 degrees of freedom: one standard deviation is 1.
    assert cohens_d(torch.tensor([3.0, 4, 5]), torch.tensor([0.0, 1, 2])) == pytest.approx(3.0)
    vectors = MeanDifference(source_layer=2, target_layer=4)(
        llama, Prompts.from_ids(POSITIVE), Prompts.from_ids(NEGATIVE)
    )
    ends = [torch.stack([mean_residual(llama, [row], 2, 1) for row in rows]) for rows in (POSITIVE, NEGATIVE)]
    wanted = cohens_d(*(end @ vectors.theta[0] for end in ends))
    assert vectors.scores["separation"] == pytest.approx([wanted], rel=1e-3) and wanted > 0
    pair = MeanDifference(source_layer=2, target_layer=4)(
        llama, Prompts.from_ids(POSITIVE[:1]), Prompts.from_ids(NEGATIVE[:1])
    )
    assert pair.scores["separation"] == [math.inf]


def test_swapped_sets_give_the_opposite_vector(llama):
    method = MeanDifference(source_layer=1, target_layer=4)
    there = method(llama, Prompts.from_ids(POSITIVE), Prompts.from_ids(NEGATIVE))
    back = method(llama, Prompts.from_ids(NEGATIVE), Prompts.from_ids(POSITIVE))
    torch.testing.assert_close(there.theta, -back.theta)
    assert there.radius != back.radius  # the unit is the negative set's


def test_what_it_refuses(llama):
    method = MeanDifference(source_layer=1, target_layer=4)
    positive, negative = Prompts.from_ids(POSITIVE), Prompts.from_ids(NEGATIVE)
    with pytest.raises(ValueError, match="3 positive and 3 negative prompts have the same mean residual at layer 1"):
        method(llama, positive, Prompts.from_ids(POSITIVE[::-1]))
    with pytest.raises(ValueError, match="same mean residual at layer 0"):
        # At the embeddings nothing tells prompts apart that end alike.
        MeanDifference(source_layer=0, target_layer=4)(llama, Prompts.from_ids([[5, 9]]), Prompts.from_ids([[6, 7, 9]]))
    with pytest.raises(ValueError, match="target layer is 9 but the model has 4 layers"):
        MeanDifference(source_layer=1, target_layer=9)(llama, positive, negative)
    with pytest.raises(ValueError, match="source layer 4 is not before target layer 4"):
        MeanDifference(source_layer=4, target_layer=4)
    with pytest.raises(ValueError, match="tokens is 0"):
        MeanDifference(source_layer=1, target_layer=4, tokens=0)
    with pytest.raises(ValueError, match="radius is 0.0"):
        MeanDifference(source_layer=1, target_layer=4, radius=0.0)
