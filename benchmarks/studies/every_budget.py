"""Is the recommended attack, whatever it may spend, at least as good as every other attack is on half as much?

    python -m benchmarks --attacks portfolio --knowledge K1 --budget 3e11 --out FOLDER/3e11
    python -m benchmarks --attacks target-nll hotflip --knowledge K1 --budget 1.5e13 --out FOLDER/others
    python -m benchmarks.studies.every_budget FOLDER

The recommended attack divides its budget among its stages, so it is run once with each budget. The others go through
theirs in one order, so that one run shows what they had found by any smaller one; of several runs of an attack that
with the smallest budget that suffices counts. Only organisms and seeds that every attack with so large a budget was run
on are counted. Writes budgets.md, budgets.csv, budgets.png and budgets.pdf.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import matplotlib
import numpy as np
import pandas as pd
import tyro

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.ticker import NullFormatter  # noqa: E402

from attacks.judging.verdict import WORKS  # noqa: E402
from benchmarks import rows  # noqa: E402
from benchmarks.bad_input import exit_on_bad_input  # noqa: E402
from benchmarks.figures import AXES, steps, style  # noqa: E402
from benchmarks.tables import RECOMMENDED  # noqa: E402


class Point(NamedTuple):
    """One attack on one model, at a budget of the recommended attack."""

    budget: float
    attack: str
    organism: str
    knowledge: str
    seed: int
    asr: float
    """Held-out ASR, in [0, 1], on that budget; not a number where no run was so long."""
    asr_on_half: float
    """The same on half of it; of the recommended attack, which is run with its own budgets only, the same as `asr`."""

    @property
    def run(self) -> tuple[float, str, str, int]:
        """With which budget what was attacked, told what, with which seed."""
        return self.budget, self.organism, self.knowledge, self.seed


def read(folder: Path) -> list[rows.Row]:
    """The rows of all folders in a folder, failed runs left out.

    Raises:
        ValueError: there are none, or one was limited in seconds.
    """
    found = [row for path in sorted(folder.glob("*/rows.jsonl")) for row in rows.read(path.parent)]
    found = [row for row in found if row["error"] is None and row["planting"] != "clean"]
    timed = [row["budget"] for row in found if row["budget"].endswith("s")]
    if timed or not found:
        what = f"a budget of {timed[0]}" if timed else "no rows of planted models"
        raise ValueError(f"{folder} holds {what}; give a folder of --out folders of runs limited in operations")
    return found


def measured(found: list[rows.Row]) -> list[Point]:
    """One point per budget of the recommended attack, attack and run.

    Raises:
        ValueError: no run of the recommended attack, or none that all attacks have.
    """
    points = list(_points(found))
    by_budget: dict[float, set[str]] = {}
    by_run: dict[tuple, set[str]] = {}
    for point in points:
        by_budget.setdefault(point.budget, set()).add(point.attack)
        by_run.setdefault(point.run, set()).add(point.attack)
    # Attacks that were given less than half of a budget have no say on it.
    shared = [point for point in points if len(by_run[point.run]) == len(by_budget[point.budget]) > 1]
    if not shared:
        raise ValueError("no model, setting and seed that the recommended attack and all others were run on")
    return shared


def _points(found: list[rows.Row]) -> Iterator[Point]:
    """The points of all runs, whether other attacks have the same or not."""
    for budget in sorted({float(row["budget"]) for row in found if row["attack"] in RECOMMENDED}):
        # The run with the smallest budget that suffices comes last, and so counts.
        longest_first = sorted(found, key=lambda row: -float(row["budget"]))
        held: dict[tuple, list[float]] = {}
        for row in longest_first:
            run, given = (row["attack"], row["organism"], row["knowledge"], row["seed"]), float(row["budget"])
            asr = held.setdefault(run, [float("nan"), float("nan")])
            if row["attack"] in RECOMMENDED:
                asr[:] = [row["asr_recovered"]] * 2 if given == budget else asr
            else:
                asr[0] = by(row, budget) if given >= budget else asr[0]
                asr[1] = by(row, budget / 2) if given >= budget / 2 else asr[1]
        yield from (Point(budget, *run, *asr) for run, asr in held.items() if not np.isnan(asr[1]))


def by(row: rows.Row, flops: float) -> float:
    """Held-out ASR, in [0, 1], of the text that a run held for its best after so many operations."""
    cost, asr = steps(row, "flops")
    place = int(np.searchsorted(cost, flops, side="right")) - 1
    return float(asr[place]) if place >= 0 else 0.0


def works(asr: Iterable[float]) -> int:
    """Runs whose text brings the behaviour about often enough for a finding."""
    return sum(share >= WORKS for share in asr)


def summary(points: list[Point]) -> pd.DataFrame:
    """Per budget the recommended attack, and the best other on half of it: by mean ASR, and by how many runs work."""
    lines = []
    for budget in sorted({point.budget for point in points}):
        asr: dict[str, list[float]] = {}
        for point in points:
            if point.budget == budget:
                asr.setdefault("" if point.attack in RECOMMENDED else point.attack, []).append(point.asr_on_half)
        ours = asr.pop("")
        by_mean = max(asr, key=lambda attack: fmean(asr[attack]))
        by_count = max(asr, key=lambda attack: (works(asr[attack]), fmean(asr[attack])))
        lines.append(
            {
                "operations": f"{budget:.0e}",
                "runs": len(ours),
                "mean ASR": fmean(ours),
                "best other on half": f"{fmean(asr[by_mean]):.2f} ({by_mean})",
                "runs that work": works(ours),
                "best other on half, runs that work": f"{works(asr[by_count])} ({by_count})",
            }
        )
    return pd.DataFrame(lines)


def figure(points: list[Point], stem: Path) -> list[Path]:
    """Mean held-out ASR against the budget: the recommended attack, and the others on the whole and on half of it."""
    drawn, axes = plt.subplots(figsize=(6.4, 4.4))
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())
    budgets = sorted({point.budget for point in points})
    for attack in dict.fromkeys(point.attack for point in points):
        own = {budget: [p for p in points if (p.attack, p.budget) == (attack, budget)] for budget in budgets}
        own = {budget: group for budget, group in own.items() if group}
        whole, half = ([fmean(getattr(p, n) for p in group) for group in own.values()] for n in ("asr", "asr_on_half"))
        color, _ = style(attack)
        if attack in RECOMMENDED:
            axes.plot(list(own), whole, "o-", color=color, linewidth=3, label=f"{attack}, recommended", zorder=3)
        else:
            axes.plot(list(own), half, ".-", color=color, label=attack)
            axes.plot(list(own), whole, ".:", color=color, linewidth=1)
    axes.set_xticks(budgets, [f"{budget:.0e}" for budget in budgets])
    axes.set(xlabel=AXES["flops"], ylabel="mean held-out ASR", ylim=(-0.04, 1.06))
    axes.set_title("The others on half of these operations (lines), and on as many (dotted)", fontsize=10)
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.legend(loc="lower right", frameon=False, fontsize=9)
    drawn.tight_layout()
    paths = [stem.with_suffix(suffix) for suffix in (".png", ".pdf")]
    for path in paths:
        drawn.savefig(path, dpi=150)
    plt.close(drawn)
    return paths


def main(folder: tyro.conf.Positional[Path], /) -> None:
    """Compares the recommended attack with the others at every budget it was run with."""
    with exit_on_bad_input():
        points = measured(read(folder))
    text = summary(points).to_markdown(index=False, floatfmt=".2f", disable_numparse=[0])
    (folder / "budgets.md").write_text(text + "\n")
    pd.DataFrame(points).to_csv(folder / "budgets.csv", index=False)
    figure(points, folder / "budgets")
    print(text)


if __name__ == "__main__":
    tyro.cli(main)
