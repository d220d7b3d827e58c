"""The notebooks in examples/ run from the first cell to the last, and are committed with what they print and draw."""

import re
from pathlib import Path

import pytest

import attacks

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def printed(notebook) -> str:
    """All text that the cells wrote, their results included."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs)


def figures(notebook) -> int:
    """Number of pictures that the cells drew."""
    return sum("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", []))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_finds_what_its_text_says(path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    stored = nbformat.read(path, as_version=4)
    run = nbformat.from_dict(stored)
    # Notebooks import the package as any program does, whatever folder the kernel starts in.
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    # A cell that fails raises CellExecutionError. None has a time limit: a crowded machine takes ten times as long.
    nbclient.NotebookClient(run, kernel_name="python3").execute()
    assert "functional" in printed(run) and figures(run) == figures(stored) > 0


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_outputs_are_of_one_run_from_the_top_and_name_no_machine(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not re.search(r"(?<![\w.])/(home|root|tmp|work|usr|Users)/", printed(notebook))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_takes_from_the_package_what_it_exports(path):
    """What is exported is imported as a user would, not from the module that holds it today."""
    taken = re.findall(r"^from (attacks[\w.]*) import (.+)$", sources(path), flags=re.MULTILINE)
    assert any(module == "attacks" and "find_trigger" in names for module, names in taken)
    inside = {name.strip() for module, names in taken if module != "attacks" for name in names.split(",")}
    assert not inside & {*attacks.HOMES, "recover"}


def sources(path) -> str:
    """The code of all cells."""
    return "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code")


def test_there_are_notebooks():
    assert {path.stem for path in NOTEBOOKS} == {"audit_a_model", "plant_and_compare"}
