"""How every command of the benchmarks ends on bad input: one line on stderr and exit code 2, no traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def exit_on_bad_input() -> Iterator[None]:
    """Turns a ValueError of the block into `error: ...` on stderr and SystemExit(2).

    Only what reads the user's input belongs into the block: a ValueError from later on is a fault of ours, whose
    traceback is wanted.
    """
    try:
        yield
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
