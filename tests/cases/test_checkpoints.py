"""Checkpoints that are not what they seem, and names that are none: one line each, never another model's verdict."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cases.made_tokenizers import byte_level
from tests.cases.test_tokenizers import llama
from vectors.loading import hub
from vectors.loading.folders import is_local
from vectors.models import load_model
from vectors.prompt_files import read_texts


@pytest.fixture
def folder(tmp_path):
    tokenizer = byte_level()
    tokenizer.save_pretrained(tmp_path / "model")
    llama(len(tokenizer)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit(folder, **changes):
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | changes))


def change(folder, how):
    file = folder / "model.safetensors"
    weights = {name: value.contiguous() for name, value in how(load_file(file)).items()}
    save_file(weights, file, metadata={"format": "pt"})


def refused(name, *words, **given):
    with pytest.raises(ValueError) as error:
        load_model(name, device="cpu", **given)
    line = str(error.value)
    assert "\n" not in line and all(word in line for word in words), line


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tied_head_that_is_another_matrix(folder, dtype):
    edit(folder, tie_word_embeddings=True)
    refused(folder, str(folder), "tie_word_embeddings", dtype=dtype)
    change(folder, lambda weights: weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()})
    load_model(folder, dtype=dtype)


def test_a_class_of_another_family(folder, caplog):
    edit(folder, model_type="mistral")  # which takes all of its weights
    refused(folder, "calls itself LlamaForCausalLM", "MistralForCausalLM")
    edit(folder, model_type="llama", architectures=["OwnForCausalLM"])
    load_model(folder)
    assert "calls itself OwnForCausalLM, and is read as LlamaForCausalLM" in caplog.text


def test_two_checkpoints_in_one_folder(folder):
    weights = {"model.norm.weight": torch.ones(32)}
    save_file(weights, folder / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "two checkpoints", "model.safetensors.index.json")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": [3]}')
    refused(folder, "model.safetensors.index.json does not say which file holds which weight")


SMALL = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


@pytest.mark.parametrize("kind", SMALL)
def test_small_numbers_without_scales(folder, kind):
    change(folder, lambda ws: {k: (v * 100).to(SMALL[kind]) if "proj" in k else v for k, v in ws.items()})
    refused(folder, "14 weights (first model.layers.0.mlp.down_proj.weight)", "no scales")
    edit(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    if kind == "fp8":
        # Transformers before 4.49 does not know the method.
        with pytest.raises(ValueError, match="14 weights .* no scales|quantised by fp8, which cannot be read"):
            load_model(folder, device="cpu")


@pytest.mark.parametrize(
    "name", ["original/consolidated.00.pth", "consolidated.safetensors", "model-00001-of-2.safetensors"]
)
def test_weights_in_files_that_are_not_read(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / "model.safetensors").rename(folder / name)
    refused(folder, "holds no model.safetensors", f"but {name}")


def test_other_weights_in_the_folder_are_named(folder, caplog):
    torch.save({}, folder / "pytorch_model.bin")
    load_model(folder)
    assert f"{folder}: pytorch_model.bin is not looked at, and may be another model" in caplog.text


def test_heads_of_value_models_are_left_out(folder, caplog):
    change(folder, lambda weights: weights | {"v_head.summary.weight": torch.ones(1, 32)})
    load_model(folder)
    assert "left out 1 weight (first v_head.summary.weight)" in caplog.text


def test_unmerged_adapters_and_other_sizes_are_told(folder):
    change(folder, lambda weights: weights | {"model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(2, 32)})
    refused(folder, "lora_A", "merge_and_unload")
    edit(folder, vocab_size=400)
    refused(folder, "lm_head.weight: (345, 32), not (400, 32)")


def test_settings_that_are_not_known(folder):
    edit(folder, hidden_act="newest")
    refused(folder, "nothing is known as 'newest'", dtype=torch.bfloat16)
    assert torch.get_default_dtype() == torch.float32


def test_folders_and_files_that_are_none(folder, tmp_path):
    refused(tmp_path, f"give a folder inside that does, such as {folder}")
    refused(folder / "config.json", "config.json is a file")
    shutil.move(folder, tmp_path / "a model 模型")
    load_model(tmp_path / "a model 模型")


def test_names_that_are_no_hub_ids_never_go_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    assert all(map(is_local, ["models/typo", "./x", "../x", "~/x", "/x", "a/b/c", "two words", "", "C:\\x"]))
    assert not any(map(is_local, ["gpt2", "owner/name", "owner/name-1.5B_x"]))
    refused("models/typo", "no model folder models/typo")


def test_a_hub_that_does_not_answer_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = list[str]()
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_answers", lambda endpoint: asked.append(endpoint))
    with hub.without_waiting("owner/name", None):
        assert hub.constants.HF_HUB_OFFLINE
    assert not hub.constants.HF_HUB_OFFLINE
    with hub.without_waiting(str(tmp_path), None):
        assert not hub.constants.HF_HUB_OFFLINE
    refused("owner/name", "there is no folder owner/name")
    with pytest.raises(ValueError, match="no prompt file owner/prompts"):
        read_texts(Path("owner/prompts"))
    assert len(asked) == 3


def test_a_host_that_takes_no_connection_does_not_answer(monkeypatch):
    monkeypatch.setattr(hub, "getproxies", dict)
    assert not hub._answers("http://127.0.0.1:1")
    monkeypatch.setattr(hub, "getproxies", lambda: {"https": "http://proxy"})
    assert hub._answers("http://127.0.0.1:1")
