"""What a search does with its budget, for people: a bar on a terminal, and elsewhere a line for every part."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from attacks.scoring.budget import Budget


@contextmanager
def shown(budget: Budget, console: Console) -> Iterator[None]:
    """Shows which part of a search runs, how much of the budget is used, and the best text so far with its success."""
    # Recovered text is printed as it is: it may hold what rich would take for markup.
    part = TextColumn("{task.description}", markup=False)
    columns = (part, BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("begins", total=1.0)

        def begins(running: Budget, name: str, best: str, rate: float) -> None:
            words = re.sub("(?<=[a-z])(?=[A-Z])", " ", name).lower()  # stages are called by their classes
            found = f"; best so far {best!r}, on {rate:.0%} of prompts that the search does not see" if best else ""
            if console.is_terminal:
                progress.update(bar, description=words + found)
            else:
                console.print(f"{min(running.share, 1.0):4.0%} of the budget used; now {words}{found}")

        budget.watch = lambda running: progress.update(bar, completed=min(running.share, 1.0))
        budget.begins = begins
        yield
