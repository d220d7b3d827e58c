"""Result rows: append-only JSONL, one line per run, written once and whole; what is done is known from it.

Several processes append under a file lock. A half-written last line (a killed run) is moved to `rows.damaged.jsonl`.
"""

import importlib.metadata
import json
import os
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

from filelock import FileLock

Row = dict[str, Any]
Key = tuple
PACKAGES = ("torch", "transformers", "peft", "accelerate", "nanogcg")


def path_of(out: Path) -> Path:
    """Where the rows of a run folder are."""
    return out / "rows.jsonl"


def lock_of(out: Path) -> FileLock:
    """Held while rows are read or written."""
    return FileLock(out / "rows.lock")


def key(row: Row) -> Key:
    """What makes a run the same run."""
    # Rows of studies have no knowledge setting.
    known = (row["knowledge"],) if "knowledge" in row else ()
    return row["organism"], row["attack"], *known, row["seed"]


def mend(out: Path) -> int:
    """Sets unreadable lines aside in rows.damaged.jsonl; returns how many."""
    path = path_of(out)
    if not path.is_file():
        return 0
    with lock_of(out):
        # Bytes, not text: a line that was cut off may end in the middle of a character.
        lines = path.read_bytes().split(b"\n")
        whole, damaged = [], []
        for line in filter(None, lines):
            try:
                key(json.loads(line))
                whole.append(line)
            except (ValueError, KeyError, TypeError):
                damaged.append(line)
        # Rewritten also where only the last line has no end: the next row would be appended to it.
        if damaged or (lines and lines[-1]):
            with (out / "rows.damaged.jsonl").open("ab") as file:
                file.write(b"".join(line + b"\n" for line in damaged))
            part = path.with_suffix(".part")
            part.write_bytes(b"".join(line + b"\n" for line in whole))
            os.replace(part, path)
    return len(damaged)


def read(out: Path) -> list[Row]:
    """The latest row of every run, in order; failed runs included.

    Raises:
        ValueError: the folder holds no rows.
    """
    path = path_of(out)
    if not path.is_file():
        raise ValueError(f"no {path.name} in {out}; give the --out folder of a benchmark run")
    mend(out)
    with lock_of(out):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    # A run that failed, or had another budget, was appended again: its last row counts, at the place of its first.
    return list({key(row): row for row in rows}.values())


def done(out: Path) -> set[tuple[Key, str]]:
    """(run, budget) pairs that need not be run again; another budget is another run, and its row replaces the first."""
    if not path_of(out).is_file():
        return set()
    return {(key(row), row["budget"]) for row in read(out) if row["error"] is None}


def append(out: Path, row: Row) -> None:
    """Writes one row and waits until it is on disk."""
    # NaN is no JSON: it must show as an error here and not as a file that other programs cannot read.
    line = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
    with lock_of(out), path_of(out).open("a", encoding="utf-8") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


@lru_cache
def provenance() -> Row:
    """Commit, dirty flag and package versions; commit is null outside a git checkout."""

    def git(*arguments: str) -> str | None:
        # The commit of this code, from whatever folder the command was started.
        here = Path(__file__).parent
        try:
            result = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return result.stdout.strip()

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    # Rows of a changed checkout cannot be reproduced from the commit alone, so they say so.
    changed = git("status", "--porcelain", "--untracked-files=no")
    versions = {package: version(package) for package in PACKAGES}
    return {
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if changed is None else bool(changed),
        "versions": versions,
    }
