"""What people see of a search while it runs."""

import io

import pytest
from rich.console import Console

from attacks.progress import shown
from attacks.scoring.budget import Budget


@pytest.mark.parametrize("terminal", [True, False])
def test_every_part_is_named_with_the_best_text_as_it_is(terminal, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    said = io.StringIO()
    console = Console(file=said, force_terminal=terminal, width=200, color_system=None, markup=False, highlight=False)
    with shown(budget := Budget(seconds=60.0), console):
        running = budget.started()
        assert running.begins is not None and running.watch is not None
        running.begins(running, "discovery", "", 0.0)
        running.watch(running)
        running.begins(running, "SearchRounds", "[bold]\x1b[2J", 0.25)
    lines = said.getvalue()
    assert "search rounds; best so far '[bold]\\x1b[2J', on 25% of prompts that the search does not see" in lines
    if not terminal:
        assert lines.splitlines()[0] == "  0% of the budget used; now discovery" and lines.count("\n") == 2
        assert "\x1b" not in lines
