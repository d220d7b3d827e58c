"""Adapters: a hook on the MLP equals a model whose weight was really changed, on nine architectures."""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from vectors.generate import complete_each, complete_ids
from vectors.methods.adapters.low_rank import adapt, mlp_output, mlp_width, pack, unpack
from vectors.methods.adapters.unsupervised import UnsupervisedAdapters, update_unit
from vectors.methods.diversity import SoftOrthogonality
from vectors.methods.objectives import ChangeNorm, OutputKL
from vectors.residual import cache_source, mean_norm
from vectors.steering import SteeringVectors, deltas


def learn(model, prompts, **changed):
    settings: dict[str, Any] = {"source_layer": 1, "target_layer": 3, "radius": 0.5, "count": 3, "steps": 20} | changed
    return UnsupervisedAdapters(**settings)(model, prompts, torch.Generator().manual_seed(0))


def drawn(model, rank=2, count=3, norm=0.5):
    """Random adapters, large enough to matter in a tiny model."""
    generator = torch.Generator().manual_seed(5)
    a = torch.randn(count, mlp_width(mlp_output(model, 1)), rank, generator=generator)
    b = norm * torch.randn(count, 32, rank, generator=generator)
    return SteeringVectors(
        theta=pack(a, b),
        source_layer=1,
        target_layer=3,
        radius=1.0,
        method="drawn",
        model_id="tiny",
        adapter_rank=rank,
    )


def changed_copy(model, adapter):
    """The model with W + B A^T in place of W."""
    (a,), (b,) = unpack(adapter.theta, adapter.adapter_rank, 32)
    copy = deepcopy(model)
    matrix = mlp_output(copy, adapter.source_layer)
    # Linear keeps (outputs, inputs), Conv1D the other way round.
    weight = matrix.weight
    assert isinstance(weight, torch.Tensor)
    weight.data += a @ b.T if isinstance(matrix, Conv1D) else b @ a.T
    return copy


def full(model, prompts):
    """(residual at layer 3, logits) of a plain forward pass."""
    positions = (prompts.attention_mask.cumsum(-1) - 1).clamp(min=0)
    output = model(
        input_ids=prompts.input_ids,
        attention_mask=prompts.attention_mask,
        position_ids=positions,
        use_cache=False,
        output_hidden_states=True,
    )
    return output.hidden_states[3], output.logits


def close(actual, expected):
    """Equal but for float32 rounding in another order of operations."""
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_the_hook_equals_a_changed_weight(model, prompts):
    adapters, real = drawn(model), prompts.attention_mask.bool()
    hidden, logits = full(model, prompts)
    moved = deltas(model, prompts, adapters, tokens=None)
    for index in range(len(adapters)):
        wanted_hidden, wanted_logits = full(changed_copy(model, adapters[index]), prompts)
        assert (wanted_logits - logits)[real].abs().max() > 1e-2  # the update does something to compare
        close(moved[index][real], (wanted_hidden - hidden)[real])
        with adapters[index].apply(model):
            close(full(model, prompts)[1][real], wanted_logits[real])
    rows = prompts.repeat(len(adapters))
    with adapters.apply(model, repeats=len(prompts)):
        together = full(model, rows)[0]
    real = rows.attention_mask.bool()
    close((together - hidden.repeat(len(adapters), 1, 1))[real], moved.flatten(0, 1)[real])
    assert torch.equal(full(model, prompts)[1], logits)


def test_scale_0_is_exact_and_the_hook_goes(model, prompts):
    adapters, clean = drawn(model)[0], full(model, prompts)[1]
    with adapters.apply(model, scale=0.0):
        assert torch.equal(full(model, prompts)[1], clean)
    with pytest.raises(RuntimeError, match="on purpose"), adapters.apply(model):
        raise RuntimeError("on purpose")
    assert not mlp_output(model, 1)._forward_hooks
    assert torch.equal(full(model, prompts)[1], clean)


def test_learned_objective_is_that_of_changed_weights(model, prompts):
    adapters = learn(model, prompts, objective=ChangeNorm(), rank=2, count=2, steps=3)
    clean = full(model, prompts)[0][:, -3:]
    for index, value in enumerate(adapters.scores["objective"]):
        moved = full(changed_copy(model, adapters[index]), prompts)[0][:, -3:]
        assert value == pytest.approx(float((moved - clean).square().sum()), rel=1e-3)


@pytest.mark.parametrize("objective", [ChangeNorm(), OutputKL()])
def test_objective_rises(llama, prompts, objective):
    seen = []
    adapters = UnsupervisedAdapters(
        source_layer=1, target_layer=4, radius=0.5, rank=2, count=3, steps=40, objective=objective
    )(llama, prompts, torch.Generator().manual_seed(0), watch=seen.append)
    assert len(seen) == 40 and adapters.method == f"adapters/{type(objective).__name__}"
    assert (torch.tensor(adapters.scores["objective"]) > 1.5 * seen[0]).all()


def test_columns_keep_their_norm(llama, prompts):
    """R per mean residual norm and mean norm of the MLP's activations; both taken here by plain hooks."""
    adapters = learn(llama, prompts, rank=2, radius=0.7)
    seen = []
    handle = mlp_output(llama, 1).register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    full(llama, prompts)
    handle.remove()
    counted = prompts.attention_mask.cumsum(-1) > 1  # left padding: real, and not the first
    unit = mean_norm(cache_source(llama, prompts, 1)) / float(seen[0].norm(dim=-1)[counted].mean())
    a, b = unpack(adapters.theta, 2, 32)
    torch.testing.assert_close(a.norm(dim=1), torch.ones(3, 2))
    torch.testing.assert_close(b.norm(dim=1), torch.full((3, 2), 0.7 * unit))
    assert update_unit(llama, cache_source(llama, prompts, 0)) == pytest.approx(unit, rel=1e-5)


def test_a_step_follows_the_tangent_of_each_column(llama, prompts):
    """Adam's first step is lr times the sign of the gradient, less what would only change the column's norm."""
    start, after = (learn(llama, prompts, objective=ChangeNorm(), rank=2, steps=1, lr=lr) for lr in (1e-9, 0.02))
    a, b = (part.clone() for part in unpack(start.theta, 2, 32))
    norm = b.norm(dim=1, keepdim=True).mean()
    a, b = a.requires_grad_(), (b / norm).requires_grad_()
    clean = full(llama, prompts)[0]
    with adapt(llama, 1, pack(a, norm * b).repeat_interleave(len(prompts), dim=0), 2):
        moved = full(llama, prompts.repeat(3))[0]
    (moved - clean.repeat(3, 1, 1))[:, -3:].square().sum().backward()
    for columns, new in zip((a, b), unpack(after.theta, 2, 32), strict=True):
        assert columns.grad is not None
        along = (columns.grad * columns).sum(1, keepdim=True) * columns
        stepped = columns + 0.02 * (columns.grad - along).sign()
        wanted = torch.nn.functional.normalize(stepped, dim=1)
        torch.testing.assert_close(torch.nn.functional.normalize(new, dim=1), wanted.detach(), atol=1e-4, rtol=1e-3)


def test_adapters_do_not_depend_on_the_batch(llama, prompts):
    whole, parts = learn(llama, prompts, rank=2), learn(llama, prompts, rank=2, batch_size=2)
    torch.testing.assert_close(whole.theta, parts.theta, atol=1e-4, rtol=1e-3)
    assert torch.equal(whole.theta, learn(llama, prompts, rank=2).theta)
    assert not torch.equal(whole.theta[0], whole.theta[1])
    close(deltas(llama, prompts, whole, batch_size=1), deltas(llama, prompts, whole))


def test_a_term_keeps_adapters_apart_and_a_deadline_ends(llama, prompts):
    adapters = learn(llama, prompts, terms=(SoftOrthogonality(weight=5.0),))
    assert adapters.method == "adapters/OutputKL/SoftOrthogonality"

    def alike(some):
        unit = torch.nn.functional.normalize(deltas(llama, prompts, some)[:, :, 0], dim=-1)
        return torch.einsum("knd,jnd->nkj", unit, unit).abs().mean()

    assert alike(adapters) < alike(learn(llama, prompts))
    calls = []
    method = UnsupervisedAdapters(source_layer=1, target_layer=3, radius=0.5, count=2, steps=100)
    generator = torch.Generator().manual_seed(0)
    method(llama, prompts, generator, deadline=lambda: len(calls.append(1) or calls) > 3)
    assert len(calls) == 4


def test_adapters_survive_saving(llama, prompts, tmp_path):
    adapters = replace(drawn(llama), scores={"objective": [1.0, 2.0, 3.0]})
    adapters.save(tmp_path / "a.safetensors")
    loaded = SteeringVectors.load(tmp_path / "a.safetensors")
    loaded.check(llama)
    assert torch.equal(loaded.theta, adapters.theta) and loaded.adapter_rank == 2
    assert replace(loaded, theta=adapters.theta) == adapters
    torch.testing.assert_close(deltas(llama, prompts, loaded), deltas(llama, prompts, adapters))


def test_what_does_not_fit_is_refused(llama, prompts):
    adapters = drawn(llama)
    with pytest.raises(ValueError, match=r"width 160 but the model has 240"):  # 240 = 3 (32 + 48)
        replace(adapters, adapter_rank=3).check(llama)
    with pytest.raises(ValueError, match="width 160 but the model has 32"):
        replace(adapters, adapter_rank=0).check(llama)
    with pytest.raises(ValueError, match="adapter's source layer is 0; give 1 to 4"):
        replace(adapters, source_layer=0).check(llama)
    with pytest.raises(ValueError, match="source_layer is 0"):
        learn(llama, prompts, source_layer=0)
    with pytest.raises(ValueError, match="rank is 0"):
        learn(llama, prompts, rank=0)
    with pytest.raises(ValueError, match="target layer is 9"):
        learn(llama, prompts, target_layer=9)
    for combine in (
        lambda: adapters + adapters,
        lambda: adapters - adapters,
        lambda: 2.0 * adapters,
        lambda: -adapters,
    ):
        with pytest.raises(ValueError, match="not defined for adapters"):
            combine()
    vectors = replace(adapters, theta=torch.ones(3, 32), adapter_rank=0)
    with pytest.raises(ValueError, match="not defined for adapters"):
        _ = vectors + adapters


def test_generation_is_that_of_changed_weights(model, cached, tokenizer, prompts):
    adapters = drawn(model, norm=1.0)
    for batch_size in (1024, 4):
        ids = complete_each(model, tokenizer, adapters, prompts, max_new_tokens=5, batch_size=batch_size)
        for index in range(len(adapters)):
            copy = changed_copy(model, adapters[index])
            wanted = complete_ids(copy, tokenizer, prompts, max_new_tokens=5)
            assert ids[index, :, : wanted.shape[1]].tolist() == wanted.tolist()
    plain = complete_ids(model, tokenizer, prompts, max_new_tokens=5)
    assert any(ids[index, :, : plain.shape[1]].tolist() != plain.tolist() for index in range(len(adapters)))


def test_gradient_with_respect_to_packed_adapters_is_that_of_the_weight(llama, prompts):
    """d/dtheta through the hook = the chain rule on W + B A^T: dA = G^T B, dB = G A."""
    adapters = drawn(llama, count=1)
    theta = adapters.theta.clone().requires_grad_()
    with adapt(llama, 1, theta, 2):
        full(llama, prompts)[1][:, -1].logsumexp(-1).sum().backward()
    copy = changed_copy(llama, adapters)
    weight = mlp_output(copy, 1).weight.requires_grad_()
    full(copy, prompts)[1][:, -1].logsumexp(-1).sum().backward()
    (a,), (b,) = unpack(adapters.theta, 2, 32)
    gradient = weight.grad
    assert isinstance(gradient, torch.Tensor) and theta.grad is not None
    torch.testing.assert_close(theta.grad, pack((gradient.T @ b)[None], (gradient @ a)[None]), atol=1e-3, rtol=1e-3)
