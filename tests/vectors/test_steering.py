"""SteeringVectors: arithmetic, indexing, application, storage; deltas against plain full forwards."""

import json
import pickle
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from vectors.residual import steer
from vectors.steering import FIELDS, SteeringVectors, deltas, model_id

UNIT = 4.0
"""mean residual norm that the vectors below are fractions of"""


def vectors_of(count=3, radius=0.5, seed=0, **changed):
    directions = torch.randn(count, 32, generator=torch.Generator().manual_seed(seed))
    theta = UNIT * radius * torch.nn.functional.normalize(directions, dim=-1)
    settings = dict(source_layer=1, target_layer=3, radius=radius, method="drawn", model_id="LlamaForCausalLM")
    scores = {"objective": [float(index) for index in range(count)]}
    return SteeringVectors(**{"theta": theta, "scores": scores, **settings, **changed})


def full(model, prompts, **extra):
    positions = (prompts.attention_mask.cumsum(-1) - 1).clamp(min=0)
    return model(
        input_ids=prompts.input_ids,
        attention_mask=prompts.attention_mask,
        position_ids=positions,
        use_cache=False,
        **extra,
    )


def hidden_at(model, prompts, layer):
    return full(model, prompts, output_hidden_states=True).hidden_states[layer]


def test_arithmetic_and_its_radius():
    one, two = vectors_of(seed=1), vectors_of(seed=2, radius=0.25)
    torch.testing.assert_close((one + two).theta, one.theta + two.theta)
    torch.testing.assert_close((one - two).theta, one.theta - two.theta)
    torch.testing.assert_close((2.0 * one).theta, 2 * one.theta)
    assert torch.equal((one * 2.0).theta, (2.0 * one).theta) and torch.equal((-one).theta, -one.theta)
    assert (one * -3.0).radius == pytest.approx(1.5) and (-one).radius == one.radius
    mixed = one + two
    assert mixed.radius == pytest.approx(float(mixed.theta.norm(dim=-1).mean()) / UNIT)
    assert (one + one).radius == pytest.approx(1.0) and (one - one).radius == 0.0
    assert mixed.scores == {} and mixed.method == "sum"  # nobody measured the sum
    first = one[0] + two
    torch.testing.assert_close(first.theta, one.theta[:1] + two.theta)
    assert len(two + one[0]) == 3


def test_radius_survives_vectors_of_length_0():
    one = vectors_of()
    nothing = one - one
    assert (nothing + one).radius == pytest.approx(one.radius)
    hole = replace(one, theta=torch.cat([torch.zeros(1, 32), one.theta[1:]]), radius=one.radius * 2 / 3)
    assert (hole + nothing).radius == pytest.approx(hole.radius)


def test_arithmetic_leaves_its_operands_alone():
    one, two = vectors_of(seed=1), vectors_of(seed=2)
    before = deepcopy((one, two))
    _ = (one + two, one - two, 3.0 * one, -two)
    assert torch.equal(one.theta, before[0].theta) and torch.equal(two.theta, before[1].theta)
    assert one.scores == before[0].scores


@pytest.mark.parametrize(
    "other",
    [
        replace(vectors_of(), model_id="other"),
        replace(vectors_of(), source_layer=2),
        replace(vectors_of(), theta=torch.ones(3, 16)),
    ],
    ids=["model", "layer", "width"],
)
def test_vectors_of_different_places_are_not_combined(other):
    for combine in (lambda: vectors_of() + other, lambda: other - vectors_of()):
        with pytest.raises(ValueError, match="cannot be combined"):
            combine()


def test_numbers_of_vectors_must_fit():
    with pytest.raises(ValueError, match="got 3 and 2 vectors"):
        _ = vectors_of(3) + vectors_of(2)


def test_subtracting_shows_the_opposite(llama, prompts):
    """To first order, which small vectors keep to."""
    small = vectors_of(radius=1e-3)
    nothing = small - small
    for opposite in (-small, nothing - small, small * -1.0):
        forth, back = (deltas(llama, prompts, some)[:, :, 0] for some in (small, opposite))
        cosine = torch.nn.functional.cosine_similarity(forth, back, dim=-1)
        assert cosine.max() < -0.99
    assert deltas(llama, prompts, nothing).abs().max() < 1e-5


def test_indexing_keeps_scores_with_their_vectors():
    vectors = vectors_of()
    for index, rows in ((1, [1]), (-1, [2]), (-3, [0]), (slice(1, None), [1, 2]), (slice(None, None, 2), [0, 2])):
        part = vectors[index]
        assert torch.equal(part.theta, vectors.theta[rows])
        assert part.scores == {"objective": [float(row) for row in rows]}
    part = vectors[[2, 0]]
    assert torch.equal(part.theta, vectors.theta[[2, 0]]) and part.scores == {"objective": [2.0, 0.0]}
    assert [one.scores["objective"] for one in vectors] == [[0.0], [1.0], [2.0]]  # a loop ends
    for beyond in (3, -4):
        with pytest.raises(IndexError):
            _ = vectors[beyond]


def test_rows_of_a_batch_are_vector_major(model, prompts):
    vectors = vectors_of(2, radius=2.0)
    with vectors.apply(model, repeats=len(prompts)):
        together = full(model, prompts.repeat(2)).logits.unflatten(0, (2, len(prompts)))
    real = prompts.attention_mask.bool()
    for index in range(2):
        with vectors[index].apply(model):  # one vector serves a batch of any size
            alone = full(model, prompts).logits
        torch.testing.assert_close(together[index][real], alone[real], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(together[0], together[1])


def test_scale_0_is_exact_and_the_hook_goes(model, prompts):
    clean = full(model, prompts).logits
    with vectors_of()[0].apply(model, scale=0.0):
        assert torch.equal(full(model, prompts).logits, clean)
    with pytest.raises(RuntimeError, match="on purpose"), vectors_of()[0].apply(model):
        raise RuntimeError("on purpose")
    assert torch.equal(full(model, prompts).logits, clean)


@pytest.mark.parametrize("tokens", [1, 2, None])
def test_deltas_are_those_of_full_forwards(model, prompts, tokens):
    vectors = vectors_of(radius=1.0)
    clean = hidden_at(model, prompts, 3)
    for source_layer in (0, 1):
        some = replace(vectors, source_layer=source_layer)
        found = deltas(model, prompts, some, tokens=tokens, batch_size=2)
        positions = slice(None) if tokens is None else slice(-tokens, None)
        real = prompts.attention_mask[:, positions].bool()
        for index, theta in enumerate(some.theta):
            with steer(model, source_layer, theta):
                wanted = (hidden_at(model, prompts, 3) - clean)[:, positions]
            torch.testing.assert_close(found[index][real], wanted[real], atol=1e-5, rtol=1e-4)
            assert not bool(found[index][~real].any())
    assert found.abs().max() > 1e-2  # there is something to compare
    torch.testing.assert_close(deltas(model, prompts, some, tokens=tokens), found, atol=1e-5, rtol=1e-4)


def test_padding_does_not_change_deltas(llama, prompts):
    together = deltas(llama, prompts, vectors_of(), tokens=2)
    for index in range(len(prompts)):
        alone = deltas(llama, prompts.take([index]), vectors_of(), tokens=2)
        torch.testing.assert_close(together[:, [index]], alone, atol=1e-4, rtol=1e-4)


def test_senseless_sizes_are_refused(llama, prompts):
    for tokens in (0, -1):
        with pytest.raises(ValueError, match=f"tokens is {tokens}"):
            deltas(llama, prompts, vectors_of(), tokens=tokens)
    for batch_size in (0, -5):
        with pytest.raises(ValueError, match=f"batch_size is {batch_size}"):
            deltas(llama, prompts, vectors_of(), batch_size=batch_size)


def test_vectors_survive_saving(llama, tmp_path):
    vectors = vectors_of(model_id=model_id(llama))
    vectors.save(tmp_path / "new" / "v.safetensors")
    loaded = SteeringVectors.load(tmp_path / "new" / "v.safetensors", llama)
    assert torch.equal(loaded.theta, vectors.theta) and replace(loaded, theta=vectors.theta) == vectors
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["v.safetensors"]  # no unfinished file is left


def write(path, theta, **changed):
    meta = {name: getattr(vectors_of(), name) for name in FIELDS} | changed
    save_file({"theta": theta}, path, metadata={"steering_vectors": json.dumps(meta)})


# Shapes in annotations are checked while testing, so a wrong shape may be named by either check.
@pytest.mark.parametrize(
    "theta",
    [torch.full((2, 32), torch.nan), torch.full((2, 32), torch.inf), torch.ones(32), torch.ones(2, 32).long()],
    ids=["nan", "inf", "flat", "integers"],
)
def test_broken_numbers_are_refused(theta, tmp_path):
    write(tmp_path / "v", theta)
    with pytest.raises(ValueError, match="vectors are finite floats|holds no steering vectors"):
        SteeringVectors.load(tmp_path / "v")


def test_vectors_of_another_model_are_refused(llama, tmp_path):
    for name, theta, changed, message in (
        ("id", torch.ones(2, 32), {"model_id": "other"}, "belongs to a model of other weights"),
        ("width", torch.ones(2, 16), {}, "width 16 but the model has 32"),
        ("deep", torch.ones(2, 32), {"target_layer": 5}, "from layer 1 to 5 but the model has 4"),
        ("order", torch.ones(2, 32), {"source_layer": 3}, "from layer 3 to 3"),
    ):
        write(tmp_path / name, theta, **changed)
        with pytest.raises(ValueError, match=message):
            SteeringVectors.load(tmp_path / name, llama)
        assert len(SteeringVectors.load(tmp_path / name)) == 2


def test_files_of_another_kind_are_refused(tmp_path):
    vectors_of().save(tmp_path / "good")
    whole = (tmp_path / "good").read_bytes()
    files = {
        "empty": b"",
        "text": b"no",
        "pickle": pickle.dumps({"theta": [1.0]}),
        "torch": b"PK\x03\x04" + b"\x00" * 64,
        "truncated": whole[:-8],
        "header": whole[:20],
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="holds no steering vectors"):
            SteeringVectors.load(tmp_path / name)
    save_file({"theta": torch.ones(1, 32)}, tmp_path / "plain")
    write(tmp_path / "more", torch.ones(1, 32), colour="red")
    for name in ("plain", "more", "missing"):
        with pytest.raises(ValueError, match="holds no steering vectors"):
            SteeringVectors.load(tmp_path / name)


def test_loading_runs_no_code(tmp_path):
    class Attack:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    (tmp_path / "bad").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(ValueError, match="holds no steering vectors"):
        SteeringVectors.load(tmp_path / "bad")
    assert not (tmp_path / "ran").exists()
