"""Model folders and adapters that are not what they seem: each is refused in one line, never read as a clean model."""

import json
import shutil
from contextlib import nullcontext

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from vectors.models import load_model, weights_digest
from vectors.residual import decoder

peft = pytest.importorskip("peft")


@pytest.fixture
def adapter(llama, folder, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    peft.get_peft_model(model, config).save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def load(name, **settings):
    return load_model(name, device="cpu", dtype=torch.float32, **settings)


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change(file, how):
    """Rewrites a file of weights; `how` gets and gives names and tensors."""
    save_file({k: v.contiguous() for k, v in how(load_file(file)).items()}, file, metadata={"format": "pt"})


def refused(*words, **given):
    with pytest.raises(ValueError) as error:
        load(**given)
    line = str(error.value)
    assert "\n" not in line and all(word in line for word in words), line


LOST = {
    "compiled": lambda ws: {f"_orig_mod.{k}": v for k, v in ws.items()},
    "ddp": lambda ws: {f"module.{k}": v for k, v in ws.items()},
    "classifier": lambda ws: (
        {k: v for k, v in ws.items() if k != "lm_head.weight"} | {"score.weight": torch.ones(2, 32)}
    ),
    "one lost": lambda ws: {k: v for k, v in ws.items() if k != "model.layers.2.mlp.up_proj.weight"},
    "one more": lambda ws: ws | {"model.layers.4.mlp.up_proj.weight": torch.ones(48, 32)},
    "other shape": lambda ws: ws | {"model.layers.1.mlp.up_proj.weight": torch.ones(40, 32)},
    "nan": lambda ws: ws | {"model.norm.weight": torch.full((32,), float("nan"))},
    "infinite": lambda ws: ws | {"model.norm.weight": torch.full((32,), float("-inf"))},
}
SAID = {
    "compiled": ("lacks", "(first ", "_orig_mod.", "take '_orig_mod.' off"),
    "ddp": ("lacks", "take 'module.' off"),
    "classifier": ("lacks 1 weight (first lm_head.weight)", "score.weight"),
    "one lost": ("lacks 1 weight (first model.layers.2.mlp.up_proj.weight)",),
    "one more": ("has 1 weight (first model.layers.4.mlp.up_proj.weight)",),
    "other shape": ("has 1 weight", "model.layers.1.mlp.up_proj.weight", "another shape"),
    "nan": ("model.norm.weight", "not finite"),
    "infinite": ("model.norm.weight", "not finite"),
}


@pytest.mark.parametrize("fault", LOST)
def test_weights_that_did_not_arrive(folder, fault):
    change(folder / "model.safetensors", LOST[fault])
    refused("model", *SAID[fault], name=folder)


def test_a_tied_head_may_be_absent_but_not_both(folder, tokenizer, llama):
    llama.config.tie_word_embeddings = True
    llama.tie_weights()
    llama.save_pretrained(folder)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    load(folder)
    change(folder / "model.safetensors", lambda ws: {k: v for k, v in ws.items() if "embed_tokens" not in k})
    refused("lacks", "weights", name=folder)  # both names of the one matrix, or one of them, by version


def test_other_parts_of_a_model_are_left_out_and_named(folder, caplog):
    more = {"mtp.layers.0.weight": torch.ones(2), "visual.blocks.0.weight": torch.ones(2)}
    change(folder / "model.safetensors", lambda ws: ws | more)
    change(
        folder / "model.safetensors", lambda ws: ws | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    )
    load(folder)
    assert "only the text model is read; left out 2 weights (first mtp.layers.0.weight)" in caplog.text


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
@pytest.mark.parametrize("fault", ["pointer", "cut off"])
def test_broken_files_are_named(folder, file, fault):
    content = (folder / file).read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (folder / file).write_bytes(pointer if fault == "pointer" else content[: len(content) // 2])
    refused(str(folder / file), *(["git lfs pull"] if fault == "pointer" else []), name=folder)


def test_a_newer_tokenizer_is_named(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    edit(folder / "tokenizer.json", model=content["model"] | {"type": "Newer"})
    refused(str(folder / "tokenizer.json"), "update tokenizers", name=folder)


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq"])
def test_quantised_weights(folder, method):
    settings = {"bitsandbytes": {"load_in_4bit": True}, "gptq": {"bits": 4, "group_size": 128}}[method]
    edit(folder / "config.json", quantization_config={"quant_method": method, **settings})
    refused(str(folder), f"quantised by {method}", name=folder)


def test_a_folder_s_own_code_is_not_run(folder, tmp_path, monkeypatch):
    marker = tmp_path / "ran"
    (folder / "own.py").write_text(f"open({str(marker)!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    for file in ("tokenizer_config.json", "config.json"):
        before = (folder / file).read_text()
        edit(folder / file, auto_map={"AutoConfig": "own.Own", "AutoTokenizer": ["own.Own", None]})
        refused(str(folder / file), "auto_map", "never run", name=folder)
        (folder / file).write_text(before)
    edit(folder / "config.json", auto_map={"AutoConfig": "own.Own"}, model_type="own")
    refused("auto_map", name=folder)
    assert not marker.exists()


def test_pickles_are_read_only_when_asked(folder, adapter):
    for file, name in (
        (adapter / "adapter_model.safetensors", "adapter_model.bin"),
        (folder / "model.safetensors", "pytorch_model.bin"),
    ):
        torch.save(load_file(file), file.with_name(name))
        file.unlink()
        refused(name, "pickle", name=folder, adapter=adapter)
    load(folder, adapter=adapter, allow_pickle=True)


def test_a_shard_that_is_missing(folder):
    edit_index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(edit_index))
    refused("lacks 1 of 1 shards", "model-00002-of-00002.safetensors", name=folder)


UNFIT = {
    "other class": lambda ws: {k.replace(".model.layers.", ".model.language_model.layers."): v for k, v in ws.items()},
    "half": lambda ws: {k: v for k, v in ws.items() if ".layers.0." in k},
    "one more": lambda ws: ws | {"base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": torch.ones(2, 32)},
    "empty": lambda ws: {k: torch.empty(0) for k in ws},
    "nan": lambda ws: {k: v * float("nan") if ".layers.3." in k else v for k, v in ws.items()},
    "other shape": lambda ws: {k: torch.ones(2, 31) if "lora_A" in k else v for k, v in ws.items()},
}
FAULTS = {
    "other class": (
        "8 of the adapter's 8 weights found no place",
        "language_model.layers.0",
        "8 of 8 places stayed empty",
    ),
    "half": ("6 of 8 places stayed empty", "layers.1.self_attn.q_proj.lora_A"),
    "one more": ("1 of the adapter's 9 weights found no place", "layers.9"),
    "empty": ("8 of 8 weights of size 0", "layers.0.self_attn.q_proj.lora_A"),
    "nan": ("2 weights", "layers.3.", "not finite"),
    "other shape": ("does not fit the model", "layers.0.self_attn.q_proj.lora_A"),
}


@pytest.mark.parametrize("fault", UNFIT)
def test_adapters_that_do_not_fit(folder, adapter, fault):
    change(adapter / "adapter_model.safetensors", UNFIT[fault])
    refused(str(adapter), *FAULTS[fault], name=folder, adapter=adapter)


def test_broken_adapter_files_are_named(folder, adapter):
    file = adapter / "adapter_model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\n")
    refused(str(file), "git-lfs pointer", name=folder, adapter=adapter)
    edit(adapter / "adapter_config.json", peft_type="PROMPT_TUNING")
    file.unlink()
    refused(str(adapter), "PROMPT_TUNING", "cannot be merged", name=folder, adapter=adapter)


def test_an_adapter_given_as_the_model(folder, adapter, tmp_path):
    wanted, _ = load(folder, adapter=adapter)
    model, _ = load(adapter)  # its config names the base, a folder that is there
    assert weights_digest(model) == weights_digest(wanted)
    edit(adapter / "adapter_config.json", base_model_name_or_path="/elsewhere/base")
    refused(str(adapter), "/elsewhere/base", "--adapter", name=adapter)
    refused("one adapter", name=adapter, adapter=adapter)


def test_adapter_files_beside_merged_weights_are_not_applied_again(folder, adapter, tmp_path, caplog):
    wanted, tokenizer = load(folder, adapter=adapter)
    wanted.save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / file, tmp_path / "merged" / file)
    model, _ = load(tmp_path / "merged")
    assert "the weights are taken without it" in caplog.text
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert weights_digest(model) == weights_digest(wanted)
    assert model.name_or_path == str(tmp_path / "merged")


def test_the_adapter_s_tokenizer_comes_first(folder, adapter, tokenizer):
    tokenizer.chat_template = "{{ messages[0]['content'] }} w7"
    tokenizer.save_pretrained(adapter)
    for file in (folder / "chat_template.jinja", folder / "tokenizer_config.json"):
        file.unlink(missing_ok=True)
    _, found = load(folder, adapter=adapter)
    assert found.chat_template == tokenizer.chat_template and found.padding_side == "left"


@pytest.mark.parametrize("tied", [False, True])
def test_tokens_that_an_adapter_adds(folder, llama, tokenizer, tmp_path, prompts, tied):
    llama.config.tie_word_embeddings = tied
    llama.tie_weights()
    llama.save_pretrained(folder)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    base.resize_token_embeddings(66, mean_resizing=False)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    with pytest.warns(UserWarning) if tied else nullcontext():
        adapted = peft.get_peft_model(base, config).eval()
    for name, weight in adapted.named_parameters():
        if "modules_to_save" in name and "embed" in name:
            weight.data += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
    wanted = adapted(input_ids=prompts.input_ids[:1]).logits.detach()
    adapted.save_pretrained(str(tmp_path / "resized"), save_embedding_layers=False)
    refused("66 tokens", "has 64", name=folder, adapter=tmp_path / "resized")
    tokenizer.add_tokens(["<|tool|>", "<|code|>"], special_tokens=True)
    tokenizer.save_pretrained(tmp_path / "resized")
    model, found = load(folder, adapter=tmp_path / "resized")
    assert len(found) == 66 and decoder(model).head.weight.shape == (66, 32)
    torch.testing.assert_close(model(input_ids=prompts.input_ids[:1]).logits, wanted, atol=1e-4, rtol=1e-3)


def test_a_tokenizer_that_is_too_large(folder, tokenizer):
    tokenizer.add_tokens(["<|tool|>"])
    tokenizer.save_pretrained(folder)
    refused("65 tokens", "has 64", name=folder)


def test_templates(folder, tokenizer, tmp_path):
    _, plain = load(folder, template="none")
    chat = [{"role": "user", "content": "w5 w6"}]
    assert plain.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == "w5 w6"
    (tmp_path / "own.jinja").write_text("w9 {{ messages[0]['content'] }}")
    _, own = load(folder, template=tmp_path / "own.jinja")
    assert own.apply_chat_template(chat, tokenize=False) == "w9 w5 w6"
    refused("no chat template", name=folder, template=tmp_path / "nowhere.jinja")
    (tmp_path / "broken.jinja").write_text("{{ messages[")
    refused("does not work", name=folder, template=tmp_path / "broken.jinja")


def test_a_digest_knows_weights_not_paths(folder, llama, tmp_path):
    shutil.copytree(folder, tmp_path / "moved")
    model, _ = load(folder)
    digest = weights_digest(model)
    assert digest == weights_digest(load(tmp_path / "moved")[0])
    assert digest == weights_digest(load_model(folder, device="cpu", dtype=torch.bfloat16)[0])
    change(folder / "model.safetensors", lambda ws: ws | {"model.norm.weight": ws["model.norm.weight"] * 1.1})
    assert digest != weights_digest(load(folder)[0])
