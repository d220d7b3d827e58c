"""Full forward = early exit = slice = cached = unpadded = steered, on nine architectures."""

import pytest
import torch
from transformers import DynamicCache

from vectors.prompts import Prompts
from vectors.residual import cache_source, decoder, mean_norm, read, run_slice, steer, unembed


def close(actual, expected):
    """Equal but for float32 rounding in another order of operations."""
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


def positions(prompts):
    return (prompts.attention_mask.cumsum(-1) - 1).clamp(min=0)


def full(model, prompts, **extra):
    return model(
        input_ids=prompts.input_ids,
        attention_mask=prompts.attention_mask,
        position_ids=positions(prompts),
        use_cache=False,
        **extra,
    )


def read_all(model, prompts, layers):
    return read(model, layers=layers, input_ids=prompts.input_ids, attention_mask=prompts.attention_mask)


def test_early_exit_reads_what_the_full_forward_has(model, prompts):
    real = prompts.attention_mask.bool()
    output = full(model, prompts, output_hidden_states=True)
    for layer in range(4):
        hidden = read_all(model, prompts, [layer])[layer]
        close(hidden[real], output.hidden_states[layer][real])
    last = read_all(model, prompts, [1, 4])[4]
    close(unembed(model, last)[real], output.logits[real])


def test_nothing_runs_behind_the_last_layer_read(model, prompts):
    calls = []
    handles = [layer.register_forward_hook(lambda *_: calls.append(1)) for layer in decoder(model).layers]
    read_all(model, prompts, [2])
    for handle in handles:
        handle.remove()
    assert len(calls) == 2


def test_slice_continues_the_full_forward(model, prompts):
    real = prompts.attention_mask.bool()
    whole = read_all(model, prompts, [3, 4])
    for layer in (0, 1, 2):
        source = cache_source(model, prompts, layer)
        rows = run_slice(model, source, source.hidden.repeat(2, 1, 1), to=4)
        for half in rows.split(len(prompts)):
            close(half[real], whole[4][real])


def test_cached_prefix_changes_nothing(model, cached, prompts):
    whole = read_all(model, prompts, [3])[3]
    cache, cut = DynamicCache(), prompts.input_ids.shape[1] - 3
    head = dict(input_ids=prompts.input_ids[:, :cut], attention_mask=prompts.attention_mask[:, :cut])
    read(model, layers=[4], past_key_values=cache, **head)
    tail = read(
        model,
        layers=[3],
        input_ids=prompts.input_ids[:, cut:],
        attention_mask=prompts.attention_mask,
        past_key_values=cache,
    )
    close(tail[3], whole[:, cut:])


def test_padding_changes_nothing(model, prompts):
    padded = read_all(model, prompts, [4])[4][:, -1]
    for row, mask, last in zip(prompts.input_ids, prompts.attention_mask, padded, strict=True):
        alone = Prompts.from_ids([row[mask.bool()].tolist()])
        close(read_all(model, alone, [4])[4][0, -1], last)


def test_steering_equals_a_slice_from_a_moved_source(model, prompts, generator):
    vectors = torch.randn(len(prompts), 32, generator=generator)
    real = prompts.attention_mask.bool()
    for layer in (0, 2):
        with steer(model, layer, vectors):
            steered = full(model, prompts).logits
        source = cache_source(model, prompts, layer)
        moved = run_slice(model, source, source.hidden + vectors[:, None], to=4)
        close(unembed(model, moved)[real], steered[real])


def test_scale_zero_is_exact_and_hooks_are_gone(model, prompts):
    clean = full(model, prompts).logits
    with steer(model, 2, torch.ones(32), scale=0.0):
        assert torch.equal(full(model, prompts).logits, clean)
    with pytest.raises(RuntimeError), steer(model, 2, torch.ones(32)):
        raise RuntimeError
    assert torch.equal(full(model, prompts).logits, clean)


def test_mean_norm_leaves_out_padding_and_the_first_token(llama, prompts):
    source = cache_source(llama, prompts, 2)
    norms = [
        hidden[mask.bool()][1:].norm(dim=-1) for hidden, mask in zip(source.hidden, prompts.attention_mask, strict=True)
    ]
    assert mean_norm(source) == pytest.approx(float(torch.cat(norms).mean()), rel=1e-5)


def test_wrong_layers_and_widths_are_named(llama, prompts):
    with pytest.raises(ValueError, match="layer is 5 but the model has 4 layers"):
        read_all(llama, prompts, [5])
    with pytest.raises(ValueError, match="source layer is 4 but the model has 4 layers; give 0 to 3"):
        cache_source(llama, prompts, 4)
    with pytest.raises(ValueError, match=r"shape \(7,\), the model needs \(rows, 32\)"), steer(llama, 1, torch.ones(7)):
        pass
    source = cache_source(llama, prompts, 2)
    with pytest.raises(ValueError, match="target layer 2 is not behind source layer 2"):
        run_slice(llama, source, source.hidden, to=2)


def test_prompts_are_validated():
    with pytest.raises(ValueError, match="got 0 prompts"):
        Prompts.from_ids([])
    with pytest.raises(ValueError, match=r"lengths \[2, 0\]"):
        Prompts.from_ids([[1, 2], []])
    with pytest.raises(ValueError, match="padded on the right"):
        Prompts(input_ids=torch.ones(1, 2, dtype=torch.long), attention_mask=torch.tensor([[1, 0]]))
