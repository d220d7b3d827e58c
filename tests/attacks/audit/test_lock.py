"""Two audits never search in one folder at once; a process that is gone, however it went, keeps nobody out."""

import errno
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from attacks.audit.command import Audit, main
from attacks.audit.lock import LOCK, alone

HOLDS = """
import sys, time
from pathlib import Path
from attacks.audit.lock import alone
with alone(Path(sys.argv[1])):
    print("holds", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that searches in the folder `out`, as far as others can tell."""
    root = Path(__file__).parents[3]
    words = [sys.executable, "-c", HOLDS, str(tmp_path / "out")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, cwd=root, env=os.environ | {"PYTHONPATH": "."}) as process:
        assert process.stdout and process.stdout.readline() == b"holds\n"
        yield process
        process.kill()


def audit(tmp_path, **changes):
    """An audit that ends at a model that is not there, behind the lock."""
    return Audit(**{"model": "./nowhere", "out": tmp_path / "out", "budget": "1e9"} | changes)


def test_the_second_process_is_refused_in_one_line_until_the_first_is_gone(tmp_path, holder, capsys):
    for _ in range(2):
        assert main(audit(tmp_path)) == 2
        error = capsys.readouterr().err
        said = rf"error: {re.escape(str(tmp_path))}/out is in use by process {holder.pid}, since \d\d\d\d-.* UTC; wait"
        assert re.match(said, error) and "another --out" in error and error.count("\n") == 1
    assert main(audit(tmp_path, out=tmp_path / "other")) == 2 and "no model folder" in capsys.readouterr().err
    assert main(audit(tmp_path, dry_run=True)) == 2 and "no model folder" in capsys.readouterr().err  # writes nothing
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "out" / LOCK).exists()  # what it leaves keeps nobody out
    assert main(audit(tmp_path)) == 2 and "no model folder" in capsys.readouterr().err


def test_bad_input_leaves_no_folder_but_one_that_was_there(tmp_path, capsys):
    assert main(audit(tmp_path)) == 2 and not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    assert main(audit(tmp_path)) == 2 and (tmp_path / "out").is_dir()
    assert capsys.readouterr().err.count("no model folder") == 2


def test_a_folder_that_another_process_has_begun_to_use_meanwhile_is_kept(tmp_path, monkeypatch, capsys):
    removed = Path.rmdir

    def begun(folder):
        (folder / "findings.json.part").touch()
        removed(folder)

    monkeypatch.setattr(Path, "rmdir", begun)
    assert main(audit(tmp_path)) == 2 and (tmp_path / "out" / "findings.json.part").exists()
    assert "no model folder" in capsys.readouterr().err


def test_an_audit_holds_its_folder_until_its_results_are_written(tmp_path, monkeypatch):
    def refused(*_):
        with pytest.raises(ValueError, match="is in use by process"), alone(tmp_path / "out"):
            pass
        return [tmp_path / "findings.json"]

    monkeypatch.setattr("attacks.audit.command.searched", lambda *_: {"status": "none"})
    monkeypatch.setattr("attacks.audit.command.save", refused)
    assert main(audit(tmp_path)) == 0
    with alone(tmp_path / "out"):
        pass


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, os.strerror(errno.ENOLCK)), NotImplementedError("no flock")])
def test_where_nothing_can_be_locked_that_is_said_and_the_search_goes_on(tmp_path, monkeypatch, capsys, error):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr("attacks.audit.lock.FileLock.acquire", fails)
    with alone(tmp_path / "out"), alone(tmp_path / "out"):
        said = capsys.readouterr().err.splitlines()
    reason = str(error) if error.args == ("no flock",) else os.strerror(errno.ENOLCK)
    assert said == 2 * [
        f"{tmp_path / 'out'} cannot be locked ({reason}): let no other process search there at the same time"
    ]


def test_a_drive_without_locks_is_not_given_a_mark_that_a_killed_process_would_leave(tmp_path, monkeypatch, capsys):
    fcntl = pytest.importorskip("fcntl")

    def missing(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", missing)
    for _ in range(2):  # the second would find the mark of the first
        with alone(tmp_path / "out"):
            said = capsys.readouterr().err
            assert "cannot be locked" in said and said.count("\n") == 1
            with alone(tmp_path / "out"):
                assert "cannot be locked" in capsys.readouterr().err
