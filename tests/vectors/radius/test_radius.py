"""Rules for the radius: non-linearity against finite differences, cusp and judge with learners of known effect."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from vectors.generate import complete
from vectors.methods.controls import random_directions
from vectors.prompts import Prompts
from vectors.radius.completions import DiversityCusp, Judged, diversity, ngram_counts
from vectors.radius.nonlinearity import Nonlinearity
from vectors.radius.rule import RadiusChoice
from vectors.radius.several import SeveralRadii
from vectors.residual import cache_source, mean_norm, read, steer
from vectors.steering import SteeringVectors

RADII = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4)
SLICE: dict[str, Any] = {"source_layer": 1, "target_layer": 4}


def learner(model, prompts, jump, count=4):
    """Vectors that do nothing below `jump`, and each something else from there on."""
    unit = mean_norm(cache_source(model, prompts, 1))
    directions = random_directions(count, 32, torch.Generator().manual_seed(5))

    def learn(radius):
        norm = 20 * unit if radius >= jump else 0.0
        return SteeringVectors(theta=norm * directions, radius=radius, method="fake", model_id="tiny", **SLICE)

    return learn


def effect(model, prompts, theta):
    """Change at the last two positions of layer 4, from full forward passes."""
    inputs = {"input_ids": prompts.input_ids, "attention_mask": prompts.attention_mask}
    with steer(model, 1, theta):
        steered = read(model, layers=[4], position=slice(-2, None), **inputs)[4]
    return steered - read(model, layers=[4], position=slice(-2, None), **inputs)[4]


def test_nonlinearity_at_the_radius_found_is_the_target(llama, tokenizer, prompts, generator):
    rule = Nonlinearity(**SLICE, draws=5, tokens=2, batch_size=2)
    choice = rule(llama, tokenizer, prompts, generator)
    directions = random_directions(5, 32, torch.Generator().manual_seed(0)).double()
    llama = llama.double()  # so that a central difference is exact enough
    norm = choice.radii[0] * mean_norm(cache_source(llama, prompts, 1))
    ratios = []
    for v in directions:
        linear = norm * (effect(llama, prompts, 1e-5 * v) - effect(llama, prompts, -1e-5 * v)) / 2e-5
        ratios.append(((effect(llama, prompts, norm * v) - linear).norm() / linear.norm()) ** 2)
    value = float(torch.stack(ratios).mean().sqrt())
    assert value == pytest.approx(choice.values[choice.tried.index(choice.radii[0])], abs=1e-3)
    assert value == pytest.approx(0.5, abs=0.021)  # tolerance of the rule, and rounding
    assert choice.threshold == 0.5 and "non-linearity" in choice.quantity


def test_bracket_grows_from_either_side_and_its_values_rise(llama, tokenizer, prompts):
    found = []
    for start in (0.002, 0.5, 500.0):
        rule = Nonlinearity(**SLICE, tokens=2, start=start, tolerance=0.001)
        choice = rule(llama, tokenizer, prompts, torch.Generator().manual_seed(0))
        below = [value for radius, value in zip(choice.tried, choice.values, strict=True) if radius <= choice.radii[0]]
        assert choice.tried == sorted(choice.tried) and below == sorted(below)
        assert start in choice.tried
        found.append(choice.radii[0])
    assert found == pytest.approx([found[0]] * 3, rel=0.02)


def test_nonlinearity_works_on_every_architecture_and_ignores_padding(model, tokenizer, prompts):
    values = []
    for padded in (False, True):
        ids, mask = prompts.input_ids, prompts.attention_mask
        extra = torch.zeros(len(ids), 2 * padded, dtype=ids.dtype)
        given = Prompts(input_ids=torch.cat([extra, ids], 1), attention_mask=torch.cat([extra, mask], 1))
        rule = Nonlinearity(**SLICE, target=0.02, tolerance=0.005, draws=3, tokens=9)
        values.append(rule(model, tokenizer, given, torch.Generator().manual_seed(0)).values)
    assert values[0] == pytest.approx(values[1], rel=0.02, abs=1e-3)


def test_a_linear_slice_has_no_radius(llama, tokenizer, prompts, generator):
    for block in llama.model.layers:  # nothing is added to the stream: the slice is the identity
        block.self_attn.o_proj.weight.zero_()
        block.mlp.down_proj.weight.zero_()
    with pytest.raises(ValueError, match=r"no radius from 0\.5 to 512 has relative non-linearity 0\.5 .*it went from"):
        Nonlinearity(**SLICE)(llama, tokenizer, prompts, generator)


@pytest.mark.parametrize("jump", [0.2, 0.4, 0.8, 1.6])
def test_cusp_is_where_completions_begin_to_differ(llama, tokenizer, prompts, generator, jump):
    rule = DiversityCusp(learn=learner(llama, prompts, jump), radii=RADII, batch_size=7)
    choice = rule(llama, tokenizer, prompts, generator)
    assert choice.radii == (jump,) and choice.tried == list(RADII)
    assert all(value == pytest.approx(0, abs=1e-5) for value in choice.values[: RADII.index(jump)])
    assert choice.threshold is not None and 0 < choice.threshold < choice.values[-1] <= 1


def test_cusp_of_a_smooth_rise_is_its_middle_and_a_later_fall_does_not_matter(llama, tokenizer, prompts, generator):
    rise = dict(zip(RADII, [0.02, 0.05, 0.2, 0.6, 0.9, 0.95, 0.96, 0.5], strict=True))
    learn = learner(llama, prompts, 0.0, count=2)
    asked: list[float] = []

    def noting(radius):
        asked.append(radius)
        return learn(radius)

    def embed(texts):  # cosine 1 - d between the two vectors' texts, whatever they say
        cosine = 1 - rise[asked[-1]]
        rows = torch.tensor([[1.0, 0.0], [cosine, (1 - cosine**2) ** 0.5]])
        return rows.repeat_interleave(len(texts) // 2, dim=0)

    choice = DiversityCusp(learn=noting, radii=RADII[::-1], embed=embed)(llama, tokenizer, prompts, generator)
    assert choice.values == pytest.approx(list(rise.values()), abs=1e-5)
    assert choice.radii == (0.4,)  # the rise ends at 0.8 with 0.9, half of it is 0.46


@pytest.mark.parametrize("jump", [100.0, 0.0, 6.4])
def test_a_curve_without_a_knee_is_shown(llama, tokenizer, prompts, generator, jump):
    rule = DiversityCusp(learn=learner(llama, prompts, jump), radii=RADII)
    with pytest.raises(ValueError, match=r"no knee: .* at 0\.05, .* at 6\.4; .* try larger radii"):
        rule(llama, tokenizer, prompts, generator)


def test_diversity_and_ngrams_by_hand(tokenizer):
    counts = ngram_counts(["w5 w6 w5 w6", "w6 w5", "", ""], tokenizer)
    # w5, w6, w5w6, w6w5, nothing at all
    assert counts.tolist() == [[2, 2, 2, 1, 0], [1, 1, 0, 1, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, 1]]
    one, other = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 3.0])
    alike, apart = torch.stack([one, 2 * one, one]), torch.stack([one, one, other])
    assert diversity(torch.stack([alike, apart], dim=1)) == pytest.approx((0 + 2 / 3) / 2)


def test_judge_picks_its_favourite_radius(llama, tokenizer, prompts, generator):
    learn = learner(llama, prompts, 0.0, count=2)
    texts: list[list[str]] = []

    def judge(batch: list[str]) -> list[float]:
        texts.append(batch)
        return [float(len(texts) == 3)] * len(batch)

    seen = []

    def progress(loop) -> Iterator[float]:
        for item in loop:
            seen.append(item)
            yield item

    rule = Judged(learn=learn, radii=(0.4, 0.1, 0.2, 0.8), judge=judge, max_new_tokens=5, batch_size=4)
    choice = rule(llama, tokenizer, prompts, generator, progress=progress)
    assert choice.radii == (0.4,) and choice.values == [0, 0, 1, 0] and seen == [0.1, 0.2, 0.4, 0.8]
    theta = learn(0.4).theta
    alone = [complete(llama, tokenizer, prompts, max_new_tokens=5, vectors=v, layer=1) for v in theta]
    assert texts[0] == alone[0] + alone[1]  # vector-major, the same as one vector at a time


@pytest.mark.parametrize("scores", [[1.0], [float("nan")] * 12])
def test_bad_scores_are_named(llama, tokenizer, prompts, generator, scores):
    rule = Judged(learn=learner(llama, prompts, 0.2), radii=(0.5,), judge=lambda _texts: scores)
    with pytest.raises(ValueError, match=rf"{len(scores)} scores, .* finite, for 12 texts"):
        rule(llama, tokenizer, prompts, generator)


def test_several_radii_round_that_of_a_rule(llama, tokenizer, prompts, generator):
    inner = DiversityCusp(learn=learner(llama, prompts, 0.4), radii=RADII)
    ruled = SeveralRadii(centre=inner, factors=(2.0, 1.0))(llama, tokenizer, prompts, generator)
    assert isinstance(ruled, RadiusChoice) and ruled.radii == pytest.approx((0.4, 0.8))
    assert ruled.tried == list(RADII) and "diversity cusp" in ruled.rule


def test_bad_settings_are_named(llama, tokenizer, prompts, generator):
    learn = learner(llama, prompts, 0.2)
    with pytest.raises(ValueError, match="give at least 5"):
        DiversityCusp(learn=learn, radii=(0.1, 0.2))
    with pytest.raises(ValueError, match="more than 0"):
        Judged(learn=learn, radii=(0.0, 0.2), judge=lambda texts: [0.0] * len(texts))
    with pytest.raises(ValueError, match="factors are .*all different"):
        SeveralRadii(centre=DiversityCusp(learn=learn, radii=RADII), factors=(1.0, 1.0))
    with pytest.raises(ValueError, match="source layer 4 is not before target layer 4"):
        Nonlinearity(source_layer=4, target_layer=4)
    with pytest.raises(ValueError, match="tolerance is 0"):
        Nonlinearity(**SLICE, tolerance=0.0)
    with pytest.raises(ValueError, match="start is 9"):
        Nonlinearity(**SLICE, start=9.0, span=(0.1, 1.0))
    with pytest.raises(ValueError, match="at least 2"):
        DiversityCusp(learn=learner(llama, prompts, 0.2, count=1), radii=RADII)(llama, tokenizer, prompts, generator)
    with pytest.raises(ValueError, match="embed gave shape .* for 12 texts"):
        DiversityCusp(learn=learn, radii=RADII, embed=lambda _: torch.ones(3, 2))(llama, tokenizer, prompts, generator)
    with pytest.raises(ValueError, match="pass the radius on"):
        DiversityCusp(learn=lambda _: learn(0.7), radii=RADII)(llama, tokenizer, prompts, generator)


def test_a_plateau_just_below_the_target_is_no_radius(llama, tokenizer, prompts, monkeypatch):
    rule = Nonlinearity(**SLICE)
    for top, fine in ((0.49, False), (0.8, True)):  # 0.49 is within the tolerance of 0.5, at any large radius
        curve = lambda *_, top=top: lambda radius: top * radius / (radius + 1)  # noqa: E731
        monkeypatch.setattr(Nonlinearity, "_prepare", curve)
        if fine:  # 0.8 R / (R + 1) = 0.5
            found = rule(llama, tokenizer, prompts, torch.Generator())
            assert found.radii[0] == pytest.approx(5 / 3, rel=0.15) and min(found.tried) < 1.6 < 1.8 < max(found.tried)
        else:
            with pytest.raises(ValueError, match="no radius from 0.5 to 512"):
                rule(llama, tokenizer, prompts, torch.Generator())


def test_a_radius_that_overflows_is_too_large(llama, tokenizer, prompts, monkeypatch):
    monkeypatch.setattr(Nonlinearity, "_prepare", lambda *_: lambda radius: radius if radius < 3 else float("nan"))
    choice = Nonlinearity(**SLICE, start=200.0)(llama, tokenizer, prompts, torch.Generator())
    assert choice.radii[0] == pytest.approx(0.5, abs=0.02) and choice.values[-1] == float("inf")
