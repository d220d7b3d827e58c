"""Whatever is typed, and whatever lies in files: no traceback, one line, and an exit status that has a meaning.

Inputs are drawn by hypothesis (MacIver 2019), the same ones each time. No model is loaded: the audits here end at a
model that is not there, behind all that is read before it.
"""

import copy
import json
import string
import sys
from contextlib import contextmanager

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.attacks.audit.finished import DOCUMENT
from tests.attacks.audit.test_console_commands import run

FEW = settings(
    derandomize=True, deadline=None, max_examples=40, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
WORDS = st.text(st.characters(exclude_characters="\0"), max_size=12)  # no command line holds a zero byte
"""Half characters too, which stand for bytes that are no UTF-8"""
OPTIONS = (
    "--help", "--budget", "10m", "3e13", "-1", "nan", "--behaviour", "regex:(", "contains:", "--formats", "--format",
    "json", "html", "--out", "--json", "--quiet", "--slot", "end", "--seed", "--attack", "portfolio", "--adapter",
    "--template", "none", "--base", "--no-base", "--prompts", "--column", "--dry-run", "--", "-h", "missing/model",
)  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@contextmanager
def plain_end(capsys, *words):
    """Runs the console; checks how it ends, and that the end is one that a user can read."""
    for stream in (sys.stdout, sys.stderr):  # as the console's entry point and Python itself do
        stream.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
    status = run(*words)
    printed = capsys.readouterr()
    assert status in (0, 2, 3), (words, status)
    assert "Traceback" not in printed.err + printed.out, (words, printed.err)
    yield status, printed


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # an option may name a file to write


@FEW
@given(st.sampled_from(["audit", "report", "doctor"]), st.lists(st.sampled_from(OPTIONS) | WORDS, max_size=6))
@example("audit", ["missing/model", "--behaviour", "\udcff"])
@example("report", ["\udcff"])
def test_whatever_is_typed(capsys, monkeypatch, command, words):
    for check in ("_devices", "_organism"):  # measuring takes seconds each time
        monkeypatch.setattr(f"attacks.audit.doctor.{check}", lambda *_: iter(()))
    with plain_end(capsys, command, *words):
        pass


@FEW
@given(st.text(string.ascii_letters + "-_ ", max_size=12).filter(lambda name: name not in ("bench", "plant")))
def test_whatever_command(capsys, name):
    with plain_end(capsys, name) as (status, printed):
        assert status == 2 and printed.err.startswith("error: no command") and printed.err.count("\n") == 1


@FEW
@given(
    st.sampled_from(["txt", "jsonl", "json", "csv", "tsv", "parquet"]),
    st.binary(max_size=200)
    | JSON.map(lambda rows: json.dumps(rows).encode())
    | st.lists(JSON, max_size=20).map(lambda rows: "\n".join(map(json.dumps, rows)).encode())
    | st.lists(st.text(max_size=20), max_size=20).map(lambda rows: "\n".join(rows).encode("utf-8", "surrogatepass")),
)
@example("txt", b'{"":null,"\\u000a":null}')  # the name of a column was printed as it is, on two lines
@example("txt", b"\n".join(b"message %d" % number for number in range(20)))
def test_whatever_the_prompts_hold(capsys, tmp_path, ending, content):
    file = tmp_path / f"prompts.{ending}"
    file.write_bytes(content)
    with plain_end(capsys, "audit", "missing/model", "--prompts", str(file)) as (status, printed):
        last = printed.err.strip().splitlines()[-1]
        assert status == 2 and last.startswith("error: ") and len(last) < 1000


def paths(part, above=()):
    """Where every value of a document is."""
    yield above
    steps = part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ()
    for step, inner in steps:
        yield from paths(inner, (*above, step))


@FEW
@given(st.sampled_from([path for path in paths(DOCUMENT) if path]), JSON | st.just("(gone)"))
@example(("no_room",), "(gone)")  # as in documents of earlier versions
@example(("no_room",), 3)
def test_a_document_with_anything_in_any_field(capsys, tmp_path, path, value):
    document = copy.deepcopy(DOCUMENT)
    inner = document
    for step in path[:-1]:
        inner = inner[step]
    if value == "(gone)":
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    file = tmp_path / "findings.json"
    file.write_text(json.dumps(document))
    with plain_end(capsys, "report", str(file)) as (status, printed):
        assert status in (0, 2) and printed.err.count("\n") == (status == 2)


@FEW
@given(st.binary(max_size=100) | JSON.map(lambda value: json.dumps(value).encode()))
def test_whatever_a_file_of_findings_holds(capsys, tmp_path, content):
    (tmp_path / "findings.json").write_bytes(content)
    with plain_end(capsys, "report", str(tmp_path)) as (status, printed):
        assert status == 2 and printed.err.startswith("error: ") and printed.err.count("\n") == 1
