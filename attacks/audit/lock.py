"""One process at a time searches in a folder: a lock of the operating system, which ends with the process however that
ends, so that nothing is left behind by kill -9.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from inspect import signature
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

LOCK = "search.lock"
"""File in the folder for the results that is locked; it stays there, and says which process locked it last"""
# Newer versions put a mark in place of a lock where there are none; a killed process would leave it behind.
ONLY_REAL: Any = {"fallback_to_soft": False} if "fallback_to_soft" in signature(FileLock.__init__).parameters else {}


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keeps other processes from searching in the folder; where it cannot be locked (network drives) that is said.

    A folder that was made for the search and in which nothing was written, as the input was bad, is removed again.

    Raises:
        ValueError: another process searches there.
    """
    file, new = folder / LOCK, not folder.exists()
    lock = FileLock(file, **ONLY_REAL)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"{folder} is in use by {_holder(file)}; wait until that has ended, end it (the same command then goes on "
            "with its search), or give another --out"
        ) from None
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or error
        print(
            f"{folder} cannot be locked ({reason}): let no other process search there at the same time", file=sys.stderr
        )
    else:
        with suppress(OSError):  # a full disk; the lock holds all the same
            file.write_text(f"process {os.getpid()}, since {datetime.now(timezone.utc):%Y-%m-%d %H:%M:%S} UTC")
    try:
        yield
    finally:
        if new:
            _remove_unused(folder)
        lock.release()  # does nothing where there is no lock


def _remove_unused(folder: Path) -> None:
    """Removes a folder that holds nothing but the lock."""
    with suppress(OSError):  # gone already; on Windows a locked file cannot be removed
        if [file.name for file in folder.iterdir()] == [LOCK]:
            (folder / LOCK).unlink()
            folder.rmdir()


def _holder(file: Path) -> str:
    """What the file says of the process that has locked it."""
    try:
        return file.read_text()[:80] or "another process"
    except (OSError, ValueError):  # on Windows a locked file cannot be read
        return "another process"
