"""Compares two runs of the same grid, such as the same seeds before and after a change of the code.

    python -m benchmarks.studies.compare benchmarks/results/OLD results/NEW

Prints which runs ended with another verdict, and per attack how many worked before and after. Whether the change
matters is judged by McNemar's exact test over the runs in which one version worked and the other did not.
"""

from pathlib import Path

import pandas as pd
import tyro
from scipy.stats import binomtest

from benchmarks import rows
from benchmarks.bad_input import exit_on_bad_input

RUN = ["organism", "attack", "knowledge", "seed"]
SHOWN = ["verdict", "recovered", "asr_recovered", "flops"]


def paired(old: list[rows.Row], new: list[rows.Row]) -> pd.DataFrame:
    """One line per run that ended well in both, with columns `verdict old`, `verdict new` and so on.

    Raises:
        ValueError: no run is in both, or a run had another budget.
    """
    tables = [pd.DataFrame([row for row in found if row["error"] is None]) for found in (old, new)]
    both = tables[0].merge(tables[1], on=RUN, suffixes=(" old", " new"))
    if both.empty:
        raise ValueError(f"no run is in both folders; runs are compared that share {', '.join(RUN)}")
    # The verdict depends on the budget, so runs of unequal ones are no pair.
    other = both.loc[both["budget old"] != both["budget new"]]
    if not other.empty:
        run = other.iloc[0]
        raise ValueError(f"{run['organism']} {run['attack']}: budget {run['budget old']} then {run['budget new']}")
    for side in ("old", "new"):
        both[f"works {side}"] = both[f"verdict {side}"].isin(["exact", "functional"])
    return both


def differing(both: pd.DataFrame) -> pd.DataFrame:
    """The runs whose verdicts differ, with what was recovered and what was spent before and after."""
    changed = both.loc[both["verdict old"] != both["verdict new"]]
    return changed[[*RUN, *(f"{column} {side}" for column in SHOWN for side in ("old", "new"))]]


def per_attack(both: pd.DataFrame) -> pd.DataFrame:
    """Per attack: runs, runs that worked before and after, and the mean success rate before and after."""
    columns = {"runs": ("seed", "count")}
    columns |= {f"works {side}": (f"works {side}", "sum") for side in ("old", "new")}
    columns |= {f"mean ASR {side}": (f"asr_recovered {side}", "mean") for side in ("old", "new")}
    return both.groupby(["knowledge", "attack"], as_index=False).agg(**columns)


def verdict(both: pd.DataFrame) -> str:
    """How many runs changed, and McNemar's exact test on those that worked in one version only."""
    gained = int((both["works new"] & ~both["works old"]).sum())
    lost = int((both["works old"] & ~both["works new"]).sum())
    same = int((both["verdict old"] == both["verdict new"]).sum())
    # Runs that worked in both versions, or in neither, say nothing of the change: were it without effect, each of the
    # others would be as likely gained as lost.
    p = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    return (
        f"{same} of {len(both)} runs have the same verdict. {gained} work now that did not before, {lost} worked "
        f"before that do not now (McNemar's exact test: p = {p:.2f})."
    )


def main(old: tyro.conf.Positional[Path], new: tyro.conf.Positional[Path], /) -> None:
    """Prints the runs that differ between two result folders of the same grid."""
    with exit_on_bad_input():
        both = paired(rows.read(old), rows.read(new))
    print(differing(both).to_markdown(index=False, floatfmt=".2g"))
    print(per_attack(both).to_markdown(index=False, floatfmt=".2f"))
    print(verdict(both))


if __name__ == "__main__":
    tyro.cli(main)
