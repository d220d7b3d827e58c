"""Adapters of every kind of peft are merged to what they are beside the weights, or refused in one line."""

import json
import shutil
import warnings
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from attacks.loading import load_suspect
from tests.cases.made_tokenizers import byte_level
from tests.cases.test_tokenizers import llama
from vectors.models import load_model, weights_digest

peft = pytest.importorskip("peft")
IDS = torch.arange(5, 20)[None]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("base"), byte_level()
    tokenizer.save_pretrained(folder)
    llama(len(tokenizer)).save_pretrained(folder)
    return folder


def adapted(base, target, config):
    """A model with a random adapter, which is saved."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    generator = torch.Generator().manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(model, config).eval()
        for weight in model.parameters():
            if weight.requires_grad:
                weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
        model.save_pretrained(str(target))
    return model


def load(base, adapter):
    return load_model(base, adapter=adapter, device="cpu", dtype=torch.float32)[0]


def lora(**settings):
    return lambda: peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False} | settings)


KINDS = {
    "rslora": lora(use_rslora=True, lora_alpha=8),
    "dora": lora(use_dora=True),
    "all-linear": lora(target_modules="all-linear"),
    "patterns": lora(target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 4}, alpha_pattern={"q_proj": 32}),
    "one layer": lora(layers_to_transform=[1]),
    "embedding": lora(target_modules=["embed_tokens", "lm_head"]),
    "whole modules": lora(modules_to_save=["lm_head", "norm"]),
    "biases": lora(bias="all"),
    "some tokens": lora(trainable_token_indices=[5, 6, 7]),
    "tokens only": lambda: peft.TrainableTokensConfig(token_indices=[5, 6, 7]),
    "norms": lambda: peft.LNTuningConfig(target_modules=["norm"]),
    "ia3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "vera": lambda: peft.VeraConfig(r=2, target_modules=["q_proj"]),
}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in peft
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_merged_answers_as_the_adapter_does(base, tmp_path, kind):
    wanted = adapted(base, tmp_path / "adapter", KINDS[kind]())(input_ids=IDS).logits
    found = load(base, tmp_path / "adapter")(input_ids=IDS).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert (found - load_model(base)[0](input_ids=IDS).logits).abs().max() > 2e-4  # it did something


@pytest.fixture
def ones(base, tmp_path):
    """A base whose query projections are 1 throughout."""
    folder = tmp_path / "ones"
    shutil.copytree(base, folder)
    weights = load_file(base / "model.safetensors")
    weights = {name: torch.ones_like(value) if "q_proj" in name else value for name, value in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def adapter(base, tmp_path):
    adapted(base, tmp_path / "adapter", lora()())
    return tmp_path / "adapter"


def edit(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def rename(folder, how):
    file = folder / "adapter_model.safetensors"
    save_file({how(name): value for name, value in load_file(file).items()}, file, metadata={"format": "pt"})


def refused(base, adapter):
    with pytest.raises(ValueError) as error:
        load(base, adapter)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in peft
def test_an_adapter_without_effect_is_refused(base, adapter):
    edit(adapter, lora_alpha=0)
    assert f"{adapter} changes nothing" in refused(base, adapter)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in peft
def test_an_adapter_that_rounding_takes_away_is_kept_in_float32(base, adapter, ones, monkeypatch, caplog):
    edit(adapter, lora_alpha=1e-3)  # above what float32 resolves about 1, below what bfloat16 does
    load(ones, adapter)
    assert "keeps" not in caplog.text
    with pytest.raises(ValueError, match="bfloat16 keeps 0% of what the adapter .* changes: .*--dtype float32"):
        load_model(ones, adapter=adapter, device="cpu", dtype=torch.bfloat16)
    monkeypatch.setattr("vectors.models.fast_dtype", lambda device: torch.bfloat16)
    model = load_model(ones, adapter=adapter, device="cpu")[0]
    assert model.dtype == torch.float32 and "so the weights are left in float32" in caplog.text
    changed = model.state_dict()["model.layers.0.self_attn.q_proj.weight"]
    assert not torch.equal(changed, torch.ones_like(changed))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in peft
@pytest.mark.parametrize(("small", "share"), [(2**-10, None), (0.0035, 0.62)])
def test_an_adapter_that_rounding_takes_away_in_part_is_told(base, adapter, ones, monkeypatch, caplog, small, share):
    """Above 1 bfloat16 has steps of 2**-7: of four rows one moves by a step, three by less than half of one."""
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    for name, value in weights.items():
        value[:] = 0
        if "lora_A" in name:
            value[0] = 1
        else:
            value[:, 0] = small
            value[::4, 0] = 2**-7
    save_file(weights, file, metadata={"format": "pt"})
    edit(adapter, lora_alpha=2)
    asked = load_model(ones, adapter=adapter, device="cpu", dtype=torch.bfloat16)[0]
    assert asked.dtype == torch.bfloat16
    told = f"bfloat16 keeps {2**-14 / (2**-14 + 3 * small**2):.0%} of what the adapter {adapter} changes"
    assert ((told in caplog.text) == (share is not None)) and (share is None or f"keeps {share:.0%}" in caplog.text)
    monkeypatch.setattr("vectors.models.fast_dtype", lambda device: torch.bfloat16)
    left = load_model(ones, adapter=adapter, device="cpu")[0]
    assert left.dtype == (torch.bfloat16 if share is None else torch.float32)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in peft
def test_an_adapter_that_merging_makes_another_is_refused(base, adapter, monkeypatch):
    plain = peft.LoraModel.merge_and_unload

    def wrong(self):
        model = plain(self)
        model.lm_head.weight.data *= 1.5
        return model

    monkeypatch.setattr(peft.LoraModel, "merge_and_unload", wrong)
    assert "does something that weights it is merged into do not" in refused(base, adapter)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in peft
@pytest.mark.parametrize(
    "how",
    [
        lambda name: name.removeprefix("base_model.model."),
        lambda name: name.replace(".weight", ".default.weight"),
        lambda name: f"module.{name}",
        lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
        lambda name: f"base_model.model.{name}",
    ],
    ids=["no prefix", "name of the adapter", "distributed", "compiled", "twice"],
)
def test_names_of_other_ways_of_saving_are_told(base, adapter, how):
    rename(adapter, how)
    said = refused(base, adapter)
    assert "4 of the adapter's 4 weights found no place" in said
    assert "name its first weight base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in said


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in peft
def test_an_adapter_of_unknown_size_is_refused(base, adapter):
    whole = load_file(adapter / "adapter_model.safetensors")
    for dtype in (torch.int8, torch.float8_e4m3fn):
        small = {name: (value * 100).to(dtype) for name, value in whole.items()}
        save_file(small, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
        assert f"in the format {dtype}, whose size is not known" in refused(base, adapter)
    edit(adapter, lora_alpha=None)
    assert "does not say lora_alpha" in refused(base, adapter)


def test_kinds_that_change_no_weights_or_are_not_known_are_told(base, adapter, tmp_path):
    edit(adapter, peft_type="PREFIX_TUNING")
    assert "PREFIX_TUNING, which cannot be merged" in refused(base, adapter)
    edit(adapter, peft_type="NEWEST")
    assert "NEWEST, which this peft does not know; update peft" in refused(base, adapter)
    assert f"give a folder inside that does, such as {adapter}" in refused(base, tmp_path)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in peft
def test_settings_of_a_newer_peft_are_named(base, adapter, caplog):
    edit(adapter, some_newer_setting=3)
    load(base, adapter)
    assert f"{adapter} is of a newer peft; not known here: ['some_newer_setting']" in caplog.text


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in peft
def test_an_adapter_whose_base_is_gone_is_put_on_the_given_one(base, adapter):
    edit(adapter, base_model_name_or_path="/gone/base")
    given: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}
    suspect = load_suspect(adapter, base=base, **given)
    assert weights_digest(suspect.model) == weights_digest(load(base, adapter))
    assert suspect.base is not None and weights_digest(suspect.base) == weights_digest(load_model(base, **given)[0])
    with pytest.raises(ValueError, match="give its base .*/gone/base.*--adapter"):
        load_suspect(adapter, **given)
