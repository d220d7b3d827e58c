"""What a search does with its budget, for people: a line for every part, and a bar on a terminal."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from attacks.scoring.budget import Budget


class Output(Console):
    """Prints text as it is, and falls silent where it cannot be written (a closed pipe or terminal, a full disk).

    A search must go on all the same, and rich would end it with the status that says that a trigger was found.
    """

    def __init__(self, *, stderr: bool = False, quiet: bool = False):
        super().__init__(soft_wrap=True, markup=False, emoji=False, highlight=False, stderr=stderr, quiet=quiet)

    def _check_buffer(self) -> None:
        try:
            super()._check_buffer()
        except OSError:
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        """Sends whatever is still to be written nowhere, for Python writes the rest when it ends."""
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.file.fileno())
        os.close(nowhere)


@contextmanager
def shown(budget: Budget, console: Console) -> Iterator[None]:
    """Says which part of a search begins, with the best text so far and its success, and draws a bar on a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=1.0)

        def begins(running: Budget, name: str, best: str, rate: float) -> None:
            part = re.sub("(?<=[a-z])(?=[A-Z])", " ", name).lower()  # stages are called by their classes
            progress.update(bar, description=part)
            # Escaped where it could steer the terminal.
            found = f"; best so far {best!r}, on {rate:.0%} of prompts that the search does not see" if best else ""
            console.print(f"{min(running.share, 1.0):4.0%} of the budget used; now {part}{found}")

        budget.watch = lambda running: progress.update(bar, completed=min(running.share, 1.0))
        budget.begins = begins
        yield
