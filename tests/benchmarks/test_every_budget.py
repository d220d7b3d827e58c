"""The recommended attack beside the others on half of its budget."""

import json

import pytest

from benchmarks.studies import every_budget


def row(attack: str, budget: str, asr: float, curve=(), **other) -> dict:
    """A row as a run writes it, reduced to what is compared; the curve is (operations, held-out ASR) pairs."""
    base = {"organism": "word", "knowledge": "K1", "seed": 0, "error": None, "planting": "hard", "flops": float(budget)}
    trace = [{"flops": flops, "held_out_asr": held, "select_asr": held} for flops, held in curve]
    return base | {"attack": attack, "budget": budget, "asr_recovered": asr, "trace": trace} | other


FOUND = [
    row("portfolio", "2e11", 0.5),
    row("portfolio", "4e11", 1.0),
    row("hotflip", "3e11", 0.9, [(5e10, 0.2), (1.5e11, 0.6), (3e11, 0.9)]),
    row("hotflip", "1e11", 0.4, [(9e10, 0.4)]),
    row("gcg", "4e11", 0.3, [(3e11, 0.3)]),
]


def test_others_count_by_what_they_held_after_half_of_the_operations():
    points = {(point.budget, point.attack): point for point in every_budget.measured(FOUND)}
    assert points[2e11, "portfolio"].asr == 0.5 and points[4e11, "portfolio"].asr_on_half == 1.0
    assert points[2e11, "hotflip"].asr == 0.6
    assert points[2e11, "hotflip"].asr_on_half == 0.4  # of the run that had no more
    assert points[4e11, "hotflip"].asr_on_half == 0.6 and points[4e11, "hotflip"].asr != points[4e11, "hotflip"].asr
    assert points[2e11, "gcg"].asr_on_half == 0.0 and points[4e11, "gcg"].asr == 0.3
    first, second = every_budget.summary(list(points.values())).to_dict("records")
    assert (first["mean ASR"], first["best other on half"]) == (0.5, "0.40 (hotflip)")
    assert (second["runs that work"], second["best other on half, runs that work"]) == (1, "0 (hotflip)")


def test_runs_that_not_all_attacks_have_are_left_out():
    found = [*FOUND, row("portfolio", "2e11", 0.0, seed=1), row("hotflip", "3e11", 1.0, [(1e10, 1.0)], seed=1)]
    assert {point.seed for point in every_budget.measured(found)} == {0}
    with pytest.raises(ValueError, match="all others were run on"):
        every_budget.measured([row("portfolio", "2e11", 0.0), row("hotflip", "3e11", 1.0, [(1e10, 1.0)], seed=1)])


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ([], "no rows of planted models"),
        ([row("portfolio", "2e11", 0.0, planting="clean")], "no rows of planted models"),
        ([row("portfolio", "2e11", 0.0) | {"budget": "20s"}], "a budget of 20s"),
    ],
)
def test_folders_that_cannot_be_compared(tmp_path, found, words):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in found))
    with pytest.raises(ValueError, match=words):
        every_budget.read(tmp_path)


def test_a_table_and_a_figure_are_written(tmp_path, capsys):
    for each in FOUND:
        folder = tmp_path / f"{each['attack']}-{each['budget']}"
        folder.mkdir()
        (folder / "rows.jsonl").write_text(json.dumps(each) + "\n")
    every_budget.main(tmp_path)
    assert "0.40 (hotflip)" in capsys.readouterr().out
    assert {path.name for path in tmp_path.glob("budgets.*")} == {
        f"budgets.{end}" for end in ("md", "csv", "png", "pdf")
    }
