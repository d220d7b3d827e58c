"""Logits read off the last residual are the model's own, whatever it does to them behind the head."""

import pytest
import torch
import transformers

from tests.architectures import SIZES
from vectors.capabilities import check_logits, has_plain_cache
from vectors.generate import head_logits
from vectors.models import load_model
from vectors.residual import decoder, read, unembed

MODELS = {
    "Granite": {**SIZES, "logits_scaling": 8.0},
    "Cohere": {**SIZES, "logit_scale": 0.0625},
    "Cohere2": {**SIZES, "logit_scale": 0.25, "sliding_window": 4},
    "Gemma2": {**SIZES, "head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 0.2},
    "Lfm2": {**SIZES, "layer_types": ["conv", "conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
    "Qwen3_5Text": {
        **SIZES,
        "head_dim": 8,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    },
}


def tiny(name):
    config_class = getattr(transformers, f"{name}Config", None)
    if config_class is None:
        pytest.skip(f"{name} is not in transformers {transformers.__version__}")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_class(**MODELS[name]))
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_the_model_s_own(name, prompts):
    model, ids = tiny(name), prompts.input_ids[:1]
    true = model(input_ids=ids).logits
    last = len(decoder(model).layers)
    hidden = read(model, layers=[last], input_ids=ids)[last]
    torch.testing.assert_close(unembed(model, hidden), true)
    torch.testing.assert_close(head_logits(model, decoder(model).norm(hidden)), true)
    check_logits(model)


def test_an_unknown_way_to_logits_is_refused_at_load(llama, tokenizer, tmp_path, monkeypatch):
    llama.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    forward = transformers.LlamaForCausalLM.forward

    def other(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        assert output.logits is not None
        output.logits = 1.5 * output.logits
        return output

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", other)
    with pytest.raises(ValueError, match="LlamaForCausalLM computes its logits in a way that is not known"):
        load_model(tmp_path, device="cpu", dtype=torch.float32)


@pytest.mark.parametrize("name", ["Lfm2", "Qwen3_5Text"])
def test_convolutions_and_linear_attention_have_no_plain_cache(name):
    assert not has_plain_cache(tiny(name))


def test_attention_has_a_plain_cache(model):
    assert has_plain_cache(model)
