"""The console's own commands besides the audit: report, doctor, completion, and what they say of bad input."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers.utils import logging

from attacks.audit import __main__ as console
from attacks.audit import doctor as doctoring
from attacks.audit.findings import schema
from tests.attacks.audit.finished import DOCUMENT


def audited(folder, name="suspect", status="finding"):
    """A folder that an audit left."""
    document = copy.deepcopy(DOCUMENT)
    document["status"], document["model"]["name"] = status, name
    folder.mkdir()
    (folder / "findings.json").write_text(json.dumps(document))
    return str(folder)


def run(*words):
    """Exit status of the console."""
    try:
        return console.main(words)
    except SystemExit as ended:  # of tyro
        return ended.code


def test_reports_are_made_again_from_the_document_alone(tmp_path, capsys):
    folder = audited(tmp_path / "audit-suspect")
    assert run("report", folder) == 0
    table = capsys.readouterr().out
    assert "'garden rope'" in table and "100%" in table and "finding" in table and "wrote" in table
    first = {name: (tmp_path / "audit-suspect" / name).read_text() for name in ("report.html", "findings.sarif")}
    assert "Audit of suspect" in first["report.html"] and "SingleTokens" in first["report.html"]
    assert json.loads(first["findings.sarif"])["runs"][0]["results"]
    assert run("report", f"{folder}/findings.json", "--format", "html", "--out", str(tmp_path / "new")) == 0
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["report.html"]
    assert (tmp_path / "new" / "report.html").read_text() == first["report.html"]  # the same page each time


def test_several_audits_stand_side_by_side_and_one_that_is_torn_does_not_hide_the_others(tmp_path, capsys):
    folders = [audited(tmp_path / name, name, status) for name, status in (("one", "finding"), ("two", "none"))]
    torn = tmp_path / "torn.json"
    torn.write_text(json.dumps(DOCUMENT)[:300])
    assert run("report", *folders) == 0
    table = capsys.readouterr().out
    assert "one" in table and "two" in table and "none found" in table and "wrote" not in table
    assert run("report", *folders, str(torn), "--json") == 2
    printed = capsys.readouterr()
    rows = json.loads(printed.out)
    assert [(row["model"], row["status"], row["rate"]) for row in rows] == [("one", "finding", 1), ("two", "none", 1)]
    assert [row["audit"] for row in rows] == folders
    assert printed.err.startswith(f"error: {torn} is no whole JSON document") and printed.err.count("\n") == 1
    assert run("report", *folders, "--out", str(tmp_path)) == 2 and "--out is the folder" in capsys.readouterr().err
    assert run("report") == 2 and "no audit is given" in capsys.readouterr().err
    assert run("report", *folders, "--format", "sarif,html") == 0
    assert all((Path(folder) / "findings.sarif").is_file() for folder in folders)


def test_a_log_for_inspect_without_its_package_is_refused_in_one_line(tmp_path, capsys, monkeypatch):
    folder = audited(tmp_path / "audit-suspect")
    for name in ("attacks.audit.inspect_log", "inspect_ai", "inspect_ai.log"):
        monkeypatch.setitem(sys.modules, name, None)
    assert run("report", folder, "--formats", "inspect") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: a log for Inspect needs the package inspect_ai; install the extra")


def test_a_document_of_the_first_weeks_is_called_after_its_folder(tmp_path, capsys):
    folder = Path(audited(tmp_path / "audit-old"))
    document = json.loads((folder / "findings.json").read_text())
    del document["model"]["name"], document["cost"]["by_stage"]
    (folder / "findings.json").write_text(json.dumps(document))
    assert run("report", str(folder / "findings.json")) == 0
    assert "Audit of old" in (folder / "report.html").read_text() and "\nold " in capsys.readouterr().out


def test_a_terminal_is_not_steered_by_what_models_wrote(tmp_path, capsys):
    folder = Path(audited(tmp_path / "audit"))
    document = json.loads((folder / "findings.json").read_text())
    document["finding"]["trigger"] = document["model"]["name"] = "\x1b[2Jgone\ud800 [red]"
    (folder / "findings.json").write_text(json.dumps(document))
    assert run("report", str(folder)) == 0
    out = capsys.readouterr().out
    assert "\x1b[2J" not in out and "gone" in out and "[red]" in out


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, capsys):
    folder = audited(tmp_path / "audit")
    (tmp_path / "file").write_text("")
    assert run("report", folder, "--out", str(tmp_path / "file")) == 2
    assert "cannot be written: File exists" in capsys.readouterr().err


def saved(folder, model, tokenizer):
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    logging.enable_progress_bar()
    tokenizer.save_pretrained(folder)
    return folder


def checks(capsys):
    """(level, text) by name, of what the doctor printed as JSON."""
    printed = capsys.readouterr()
    assert not printed.err
    return {one["name"]: (one["level"], one["text"]) for one in json.loads(printed.out)}, printed.out


def test_the_doctor_says_what_a_bug_report_needs(planted, tokenizer, tmp_path, capsys):
    folder = saved(tmp_path / "private" / "suspect", planted, tokenizer)
    assert run("doctor", str(folder), "--json") == 0
    found, text = checks(capsys)
    assert found["torch"] == ("ok", torch.__version__) and {"transformers", "peft", "accelerate", "gpu"} <= set(found)
    assert "GFLOP/s in float32" in found["processor"][1] and "GB free" in found["processor"][1]
    assert found["size"][1].startswith("LlamaForCausalLM") and "64 in the context" in found["size"][1]
    assert found["template"][0] == "ok" and found["prefix cache"][0] == "ok"
    assert found["typed text"][1].startswith("61 of 61 messages come back as the same tokens")
    assert "private" not in text and str(tmp_path) not in text
    assert run("doctor", str(folder), "--template", "none") == 0  # a base model can be audited
    assert "note   template: none" in capsys.readouterr().out


def test_a_model_that_cannot_be_loaded_is_exit_2_without_its_path(tmp_path, capsys, monkeypatch):
    (tmp_path / "private" / "broken").mkdir(parents=True)
    (tmp_path / "private" / "broken" / "config.json").write_text("{")
    for given in (tmp_path / "private" / "broken", tmp_path / "private" / "none"):
        assert run("doctor", str(given), "--json") == 2
        found, text = checks(capsys)
        assert found["model"][0] == "fault" and given.name in found["model"][1]
        assert "private" not in text and "\\n" not in text
    monkeypatch.chdir(tmp_path)
    assert run("doctor", "private/none") == 2
    assert "private" not in capsys.readouterr().out


def test_what_will_not_work_is_exit_3(planted, tokenizer, tmp_path, capsys, monkeypatch):
    folder = saved(tmp_path / "suspect", planted, tokenizer)
    monkeypatch.setattr("attacks.scoring.problem.context", lambda _: 1 / 0)
    monkeypatch.setattr(doctoring.metadata, "requires", lambda _: ["torch>=99", "no-such-package", "x; extra == 'y'"])
    assert run("doctor", str(folder), "--json") == 3
    found, _ = checks(capsys)
    assert found["size"] == ("fault", "ZeroDivisionError: division by zero")
    assert found["no-such-package"] == ("fault", "not installed; no-such-package is needed") and "x" not in found


def test_without_torch_the_doctor_says_so(capsys, monkeypatch):
    def fails(name):
        raise OSError("libtorch.so: cannot open shared object file")

    monkeypatch.setattr(doctoring, "import_module", fails)
    assert run("doctor", "model", "--json") == 3
    found, _ = checks(capsys)
    assert found["torch"] == ("fault", "OSError: libtorch.so: cannot open shared object file")
    assert "processor" not in found and "model" not in found


def test_a_prefix_cache_that_gives_other_values_is_a_fault(planted, tokenizer, monkeypatch):
    from attacks.scoring.shared_prefix import SharedPrefix

    def of_other_text(model, ids, mask, depth):
        return run_prefix(model, ids.flip(1), mask, depth)

    run_prefix = SharedPrefix.run
    (check,) = doctoring._prefix_cache(planted, tokenizer)
    assert check.level == "ok"
    monkeypatch.setattr(SharedPrefix, "run", of_other_text)
    (check,) = doctoring._prefix_cache(planted, tokenizer)
    assert check.level == "fault" and "other values than the whole text" in check.text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("no model folder /home/ann/x; give one", "no model folder x; give one"),
        ("'~/.cache/hub/x' and C:\\Users\\ann\\x.bin and ../../ann/x", "'x' and x.bin and x"),
        ("61 GFLOP/s, see https://huggingface.co/docs/hub", "61 GFLOP/s, see https://huggingface.co/docs/hub"),
        ("my models/of ann/x is broken", "x is broken"),
    ],
)
def test_paths_are_cut_to_their_last_part(text, shown):
    assert doctoring.without_paths(text, doctoring.Doctor(model="my models/of ann/x")) == shown


def test_help_and_unknown_commands(capsys):
    assert run() == run("--help") == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name}" in shown for name in console.COMMANDS) and "Examples:" in shown
    for name in console.READ:
        assert run(name, "--help") == 0
        shown = capsys.readouterr().out
        assert f"usage: trigger-recovery {name}" in shown and ("Examples:" in shown or "accelerate launch" in shown)
    for name, word in (("vectors", "learn"), ("plant", "--recipes"), ("organisms", "draw")):
        assert run(name, "--help") == 0
        shown = capsys.readouterr().out
        assert f"usage: trigger-recovery {name}" in shown and word in shown
        assert "Example" in shown or "python -m benchmarks.organisms plant" in shown
    assert run("reprot") == 2 and capsys.readouterr().err == "error: no command 'reprot'; did you mean report?\n"
    assert run("x") == 2 and "there are audit, report, doctor, bench" in capsys.readouterr().err
    assert run("report", "--nothing") == 2


@pytest.mark.parametrize("name", console.READ)
def test_help_is_wrapped_to_the_terminal_and_tells_nothing_of_the_machine(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # wide enough for every option's help to be one line
    assert run(name, "--help") == 0
    _, _, options = capsys.readouterr().out.partition(" options ")
    assert str(Path.home()) not in options and str(Path(console.__file__).parents[2]) not in options
    # Without the frame, of which a pipe gets another one than a terminal.
    helps = [bare for line in options.splitlines()[1:] if (bare := line.strip("─╭╮╰╯│- "))]
    assert len(helps) > 3
    for line, after in zip(helps, helps[1:], strict=False):
        assert line.endswith((")", ".", "exit")) or after.endswith(")"), line


BASH = """
source {script}
COMP_WORDS=(trigger-recovery {words}); COMP_CWORD=$((${{#COMP_WORDS[@]}}-1))
$(complete -p trigger-recovery | sed 's/.*-F \\([^ ]*\\).*/\\1/'); printf '%s\\n' "${{COMPREPLY[@]}}"
"""


def test_shells_complete_commands_and_options(tmp_path, capsys):
    assert run("--tyro-print-completion", "bash") == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    for words, offered in (
        ("rep", {"report"}),
        ("audit --behav", {"--behaviour"}),  # whose help has several lines
        ("vectors le", {"learn"}),
        ("vectors learn --meth", {"--method"}),
        ("audit model --slot ''", {"start", "end", "random"}),
    ):
        command = BASH.format(script=tmp_path / "script", words=words)
        ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
        assert set(ended.stdout.split("\n")) - {""} == offered
    for words in (["--tyro-print-completion"], ["audit", "--tyro-print-completion", "ksh"]):
        assert run(*words) == 2 and "needs the name of a shell" in capsys.readouterr().err


def test_reading_a_report_needs_no_torch_and_a_closed_pipe_is_no_fault(tmp_path):
    folder = audited(tmp_path / "audit")
    code = (
        "import sys; from attacks.audit.__main__ import main; status = main(['report', sys.argv[1]]); "
        "sys.exit(status or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, folder], capture_output=True, check=False).returncode == 0
    with subprocess.Popen(
        [sys.executable, "-m", "attacks.audit", "report", folder, "--json"], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() in (0, 3)


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ImportError("no module torch"), 2, "error: no module torch; `trigger-recovery doctor` says what is missing"),
        (KeyboardInterrupt(), 3, "interrupted"),
        (ZeroDivisionError(), 3, "Traceback"),
    ],
)
def test_no_fault_exits_as_a_finding(monkeypatch, capsys, error, status, said):
    def fails(*_):
        raise error

    monkeypatch.setattr(console, "import_module", fails)
    monkeypatch.setattr(sys, "argv", ["trigger-recovery", "audit", "model"])
    assert console.run() == status
    printed = capsys.readouterr().err
    assert printed.startswith(said) and (said == "Traceback" or printed.count("\n") == 1)


def test_the_schema_describes_every_field():
    def undescribed(part, place=""):
        for name, one in part.get("properties", {}).items():
            if "description" not in one:
                yield place + name
            yield from undescribed(one, f"{place}{name}.")
            yield from undescribed(one.get("items", {}), f"{place}{name}[].")

    assert list(undescribed(schema())) == []
