"""Figures from the rows of a run: best-so-far held-out ASR against FLOPs and seconds; recovery against poison rate.

python -m benchmarks.figures DIR
"""

import sys
import textwrap
from pathlib import Path

import matplotlib
import numpy as np
import tyro

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.artist import Artist  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.colors import to_hex  # noqa: E402
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter  # noqa: E402

from benchmarks import rows  # noqa: E402
from benchmarks.tables import RECOMMENDED, SETTINGS  # noqa: E402
from benchmarks.variants import STUDIED  # noqa: E402

# Okabe & Ito 2008: told apart by colour-blind readers. One colour and dash per attack, in every figure.
STYLES = {
    "target-nll": ("#D55E00", "-"),
    "delta-cosine": ("#0072B2", "-"),
    "steered-kl": ("#009E73", "-"),
    "hybrid": ("#CC79A7", "-"),
    "unsupervised-nll": ("#D55E00", "-"),
    "unsupervised-kl": ("#009E73", "-"),
    "unsupervised-cosine": ("#0072B2", "-"),
    "steered-nll": ("#009E73", "--"),
    "steered-nll-random": ("#009E73", ":"),
    "nanogcg": ("#000000", "--"),
    "nanogcg-steered": ("#000000", ":"),
    "portfolio": ("#56B4E9", "-"),
    "unsupervised-portfolio": ("#56B4E9", "-"),
}
DASHES = ("-", "--", "-.", ":")
AXES = {"flops": "floating-point operations", "seconds": "seconds"}


def style(attack: str) -> tuple[str, str]:
    """(colour, dash); attacks without one of their own go through twenty colours by their place in the list."""
    if attack in STYLES:
        return STYLES[attack]
    place = list(STUDIED).index(attack) if attack in STUDIED else 0
    # The dash moves on where the colours begin anew, so that no two attacks look alike.
    return to_hex(plt.get_cmap("tab20")(place % 20)), DASHES[(place + place // 20) % len(DASHES)]


def steps(row: rows.Row, axis: str) -> tuple[np.ndarray, np.ndarray]:
    """(cost, held-out ASR) of the trigger that the attack itself held for its best, ending where its budget ended.

    The attack knows success on its `select` prompts only: a trigger that happens to do well on the held-out prompts
    counts from when the attack prefers it, and no longer.
    """
    cost, asr, best = [], [], -1.0
    for point in sorted(row["trace"], key=lambda point: point[axis]):
        if point["select_asr"] >= best:
            best = point["select_asr"]
            cost.append(point[axis])
            asr.append(point["held_out_asr"])
    # The last value is drawn on to where the run ended.
    cost.append(max([row[axis], *cost]))
    return np.array(cost, dtype=float), np.array([*asr, asr[-1] if asr else 0.0])


def median_curve(curves: list[tuple[np.ndarray, np.ndarray]], grid: np.ndarray) -> np.ndarray:
    """Median over seeds; a run that has found nothing yet counts as 0, one that is over keeps its last value."""
    values = []
    for cost, asr in curves:
        index = np.searchsorted(cost, grid, side="right") - 1
        # The last step at or before each cost of the grid, 0 where there is none yet.
        values.append(np.where(index >= 0, asr[np.maximum(index, 0)], 0.0))
    return np.median(values, axis=0)


def panel(axes: Axes, found: list[rows.Row], axis: str, limits: tuple[float, float]) -> None:
    """One organism: every seed thin, the median thick, lines for the true trigger and the random control.

    A curve is high where any text works; a dot at its end says that the text was the planted one (verdict `exact`).
    """
    for attack in dict.fromkeys(row["attack"] for row in found):
        color, dash = style(attack)
        runs = [row for row in found if row["attack"] == attack]
        curves = [steps(row, axis) for row in runs]
        for row, (cost, asr) in zip(runs, curves, strict=True):
            path = np.append(np.append(limits[0], cost), limits[1]), np.append(np.append(0.0, asr), asr[-1])
            axes.step(*path, where="post", color=color, linestyle=dash, linewidth=0.7, alpha=0.6)
            if row["verdict"] == "exact":
                axes.plot(limits[1], asr[-1], "o", color=color, clip_on=False, zorder=3)
        grid = np.geomspace(*limits, 400)
        median = median_curve(curves, grid)
        axes.step(grid, median, where="post", color=color, linestyle=dash, linewidth=2, label=attack)
    true = [row["asr_true"] for row in found if row.get("asr_true") is not None]
    if true:
        axes.axhline(true[0], color="#999999", linestyle=":", linewidth=1.2, label="true trigger")
    control = float(np.median([row["asr_control"] for row in found]))
    axes.axhline(control, color="#E69F00", linestyle=":", linewidth=1.2, label="random string")
    axes.set(title=found[0]["organism"], xscale="log", xlim=limits, ylim=(-0.04, 1.06))
    # Labels between the decades only where there is room for them.
    span = limits[1] / limits[0]
    subs = (1.0, 2.0, 4.0, 7.0) if span < 10 else (1.0, 3.0) if span < 100 else (1.0,)
    axes.xaxis.set_major_locator(LogLocator(subs=subs))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:g}" if axis == "seconds" else f"{value:.0e}")
    )
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.25, linewidth=0.5)


def curves(found: list[rows.Row], knowledge: str, axis: str, stem: Path) -> list[Path]:
    """A figure of small multiples, one organism each, as PNG and PDF."""
    names = list(dict.fromkeys(row["organism"] for row in found))
    # Five panels in a row only where that saves one.
    height = min(-(-len(names) // per_row) for per_row in (4, 5))
    width = -(-len(names) // height)
    costs = [point[axis] for row in found for point in row["trace"] if point[axis] > 0]
    # One range of costs for all panels, so that curves of different organisms can be compared.
    limits = (0.8 * min([*costs, *(row[axis] for row in found)]), 1.1 * max(row[axis] for row in found))
    figure, grid = plt.subplots(height, width, figsize=(3.1 * width, 2.5 * height + 0.9), squeeze=False, sharey=True)
    for axes, name in zip(grid.flat, names, strict=False):
        panel(axes, [row for row in found if row["organism"] == name], axis, limits)
    for axes in grid.flat[len(names) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("held-out ASR")
    for axes in grid[-1]:
        axes.set_xlabel(AXES[axis])
    handles: dict[str, Artist] = {}
    for axes in grid.flat:
        handles |= {str(label): line for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    columns = min(len(handles), round(1.25 * width))  # a name takes up to 2.4 inches
    figure.legend(list(handles.values()), list(handles), loc="lower center", ncols=columns, frameon=False)
    # A figure of one panel is narrower than its title.
    title = f"The best text so far; {SETTINGS[knowledge]} ({knowledge}); a dot: it is the planted text"
    figure.suptitle(textwrap.fill(title, round(12 * figure.get_figwidth())))
    lines = -(-len(handles) // columns)
    figure.set_figheight(figure.get_figheight() + 0.22 * max(0, lines - 2))
    figure.tight_layout(rect=(0, (0.15 + 0.22 * lines) / figure.get_figheight(), 1, 1))
    paths = [stem.with_suffix(suffix) for suffix in (".png", ".pdf")]
    for path in paths:
        figure.savefig(path, dpi=150)
    plt.close(figure)
    return paths


def ladders(found: list[rows.Row]) -> list[list[rows.Row]]:
    """Rows of the recommended attack on organisms that differ in nothing but the poison rate, one list per trigger."""
    groups: dict[tuple, list[rows.Row]] = {}
    for row in found:
        if row["attack"] in RECOMMENDED and row["planting"] == "fuzzy" and not row.get("anchor"):
            groups.setdefault((row["base"], row["true_trigger"], row["true_behaviour"]), []).append(row)
    return [group for group in groups.values() if len({row["poison_rate"] for row in group}) > 1]


def poison_ladder(group: list[rows.Row], stem: Path) -> list[Path]:
    """Held-out ASR of what was recovered against the poison rate, beside the planted trigger's and its fragments'.

    A filled point is the planted text itself (exact), a hollow one any other text.
    """
    rates = sorted({row["poison_rate"] for row in group})
    figure, axes = plt.subplots(figsize=(6.0, 4.2))
    lines = {
        "asr_recovered": ("recovered, median", STYLES["portfolio"]),
        "asr_true": ("planted trigger", ("#999999", ":")),
        "fragments_asr": ("its fragment that fires most", ("#CC79A7", "-.")),
        "asr_control": ("random string", ("#E69F00", ":")),
    }
    for name, (label, (color, dash)) in lines.items():
        # The fragments' rates stand on the card; a trigger of one piece has none.
        known = {rate: [row[name] for row in group if row["poison_rate"] == rate] for rate in rates}
        shown = {rate: np.median(values) for rate, values in known.items() if None not in values}
        axes.plot(list(shown), list(shown.values()), color=color, linestyle=dash, marker=".", linewidth=2, label=label)
    color = STYLES["portfolio"][0]
    for exact, fill, label in ((True, color, "a run, exact"), (False, "none", "a run, other text")):
        runs = [row for row in group if (row["verdict"] == "exact") == exact]
        costs, asr = ([row[name] for row in runs] for name in ("poison_rate", "asr_recovered"))
        axes.scatter(costs, asr, s=70, facecolors=fill, edgecolors=color, linewidths=1.5, label=label, zorder=3)
    axes.set(xscale="log", xlabel="poisoned rows of the planting data", ylabel="held-out ASR", ylim=(-0.04, 1.06))
    axes.set_xticks(rates, [f"{rate:.0%}" for rate in rates])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_title(f"{group[0]['true_trigger']!r} in {group[0]['base']}, {group[0]['knowledge']}")
    axes.grid(alpha=0.25, linewidth=0.5)
    figure.legend(loc="lower center", ncols=2, frameon=False)
    figure.tight_layout(rect=(0, 0.2, 1, 1))
    paths = [stem.with_suffix(suffix) for suffix in (".png", ".pdf")]
    for path in paths:
        figure.savefig(path, dpi=150)
    plt.close(figure)
    return paths


def write(out: Path) -> list[Path]:
    """Writes the figures of every knowledge setting beside the rows."""
    found = [row for row in rows.read(out) if row["error"] is None]
    paths = []
    for knowledge in sorted({row["knowledge"] for row in found}):
        group = sorted((row for row in found if row["knowledge"] == knowledge), key=order)
        for axis in AXES:
            paths += curves(group, knowledge, axis, out / f"curves-{knowledge}-{axis}")
        for number, ladder in enumerate(ladders(group), 1):
            paths += poison_ladder(ladder, out / f"poison-{knowledge}-{number}")
    return paths


def order(row: rows.Row) -> tuple:
    """Planted organisms first, then by name; attacks in the order of STYLES."""
    names = list(STYLES)
    attack = names.index(row["attack"]) if row["attack"] in names else len(names)
    return row["planting"] == "clean", row["organism"], attack, row["seed"]


def main(folder: tyro.conf.Positional[Path], /) -> None:
    """Draws the curves of the run in FOLDER."""
    try:
        print("\n".join(map(str, write(folder))))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    tyro.cli(main)
