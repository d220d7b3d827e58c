"""The tables in README and docs are those that the committed rows give; the committed rows can be read."""

import json
from pathlib import Path

import pandas as pd
import pytest

from benchmarks import readme, tables

ROWS = sorted(readme.RESULTS.rglob("rows.jsonl"))
ATTACK = {"trace", "verdict", "asr_recovered", "recovered", "true_trigger", "planting", "knowledge", "seconds", "flops"}
# Keys that a table needs, by folder: rows of the vectors study and of the sampler study are of another kind.
NEEDED = {
    "which-vectors": {"behaviours", "findings", "planted_found", "vectors", "radius", "coherence", "seconds"},
    "sampler": {"samples", "with_trigger", "fired", "loss_on"},
}


def test_no_table_is_stale():
    assert not readme.stale(), "run python -m benchmarks.readme"


def test_a_changed_table_is_made_anew_and_other_text_is_kept():
    page = (readme.ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    changed = page.replace("| unseen-and ", "| unseen-or ")
    assert changed != page and readme.filled(changed) == page


def test_bad_marks_are_named():
    with pytest.raises(ValueError, match="no table 'unsen'; there are overview, unseen, recommended"):
        readme.filled("<!-- table: unsen -->\n\n<!-- /table -->")
    with pytest.raises(ValueError, match="has no '<!-- /table -->' line"):
        readme.filled("<!-- table: unseen -->\n")


def test_a_model_counts_once_by_the_verdict_of_most_runs():
    assert readme._usual(["exact", "miss", "exact"]) == "exact"
    assert readme._usual(["exact", "functional", "functional", "exact"]) == "functional"


@pytest.mark.parametrize("path", ROWS, ids=lambda path: path.parent.name)
def test_committed_rows_have_what_tables_need(path: Path):
    for line in path.read_text(encoding="utf-8").splitlines():
        made = json.loads(line)
        assert {"organism", "attack", "seed", "budget", "commit", "error"} <= made.keys()
        if made["error"] is None:
            assert NEEDED.get(path.parent.name, ATTACK) <= made.keys()


def test_each_folder_of_rows_is_in_the_results_readme():
    text = (readme.RESULTS / "README.md").read_text(encoding="utf-8")
    assert ROWS and all(f"]({path.parent.relative_to(readme.RESULTS)}/" in text for path in ROWS)


def table_of(*runs: tuple[str, str, int, str]) -> pd.DataFrame:
    columns = ["organism", "attack", "seed", "verdict"]
    return pd.DataFrame(runs, columns=columns).assign(knowledge="K1", planting="hard")


def test_the_best_attack_is_named_on_common_runs():
    table = table_of(
        ("word", "portfolio", 0, "functional"),
        ("word", "target-nll", 0, "exact"),
        ("word", "hybrid", 0, "exact"),
        ("phrase", "portfolio", 0, "exact"),  # no other attack was run here: it does not count
    )
    said = tables.best_attacks(table)
    assert "best on the 1 runs that every attack has: `hybrid`, `target-nll`" in said
    assert said.endswith("not the recommended `portfolio` (1 worked, 0 exact).")
    assert "not the recommended" not in tables.best_attacks(table.loc[table["organism"] == "phrase"])


def test_false_findings_count_a_clean_model_once():
    table = table_of(*[("clean-control", "portfolio", seed, "functional") for seed in range(3)])
    table = pd.concat([table, table_of(("odd-control", "portfolio", 0, "none"))]).assign(planting="clean")
    said = tables.false_findings(table)
    assert "1 of 2 models" in said and "Runs with a false finding: 3 of 4" in said
    assert "0.01 to 0.99" in said  # Clopper-Pearson, 1 of 2
