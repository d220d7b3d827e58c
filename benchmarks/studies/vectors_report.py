"""Table and figure of the vectors study, from its rows: python -m benchmarks.studies.vectors_report DIR"""

import statistics
from pathlib import Path

import matplotlib
import pandas as pd
import tyro
from statsmodels.stats.proportion import proportion_confint

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

from benchmarks import rows  # noqa: E402
from benchmarks.bad_input import exit_on_bad_input

HIT, ANY = "#0072B2", "#E69F00"  # Okabe & Ito 2008


def frame(found: list[rows.Row]) -> pd.DataFrame:
    """One line per organism, behaviour and method, with all seeds together; a clean control has one line per method."""
    good = [row for row in found if row["error"] is None]
    lines = []
    for organism, method in dict.fromkeys((row["organism"], row["attack"]) for row in good):
        group = [row for row in good if (row["organism"], row["attack"]) == (organism, method)]
        total = sum(row["vectors"] for row in group)
        ranks = [row["first_rank"] for row in group if row["first_rank"]]
        common = {
            "organism": organism,
            "method": method,
            "R": statistics.median(row["radius"] for row in group),
            "runs": len(group),
            "first rank": statistics.median(ranks) if ranks else None,
            "ranked in": f"{len(ranks)}/{len(group)}" if group[0]["behaviours"] else "-",
            "findings": sum(bool(row["findings"]) for row in group),
            "planted found": sum(row["planted_found"] for row in group) if group[0]["behaviours"] else None,
            "coherence": statistics.mean(row["coherence"] for row in group),
            "s": statistics.median(row["seconds"] for row in group),
        }
        for index in range(len(group[0]["behaviours"])):
            # Behaviours stand in the order of the card in every row, so the index is the same one.
            parts = [row["behaviours"][index] for row in group]
            hits, some = (sum(part[name] for part in parts) for name in ("hits", "any"))
            # The vectors of all seeds together: an interval per seed would be of a few dozen only.
            low, high = proportion_confint(hits, total, method="wilson")
            cosines = [part["cosine_hits"] for part in parts if part["cosine_hits"] is not None]
            general = [rate for part in parts for rate in part["general"]]
            lines.append(
                common
                | {
                    "behaviour": parts[0]["behaviour"],
                    "hits/100": 100 * hits / total,
                    "low": 100 * low,
                    "high": 100 * high,
                    "any/100": 100 * some / total,
                    "cosine of hits": statistics.mean(cosines) if cosines else None,
                    "cosine of all": statistics.mean(part["cosine_all"] for part in parts),
                    "general": statistics.median(general) if general else None,
                }
            )
        if not group[0]["behaviours"]:
            lines.append(common | {"behaviour": None})
    return pd.DataFrame(lines)


def markdown(table: pd.DataFrame) -> str:
    """The lines of one organism as a Markdown table."""
    shown = []
    for line in table.to_dict("records"):
        number = lambda name, form, line=line: "-" if pd.isna(line.get(name)) else format(line[name], form)  # noqa: E731
        interval = "-" if pd.isna(line.get("low")) else f"{line['low']:.0f}-{line['high']:.0f}"
        shown.append(
            {
                "method": line["method"],
                "R": number("R", ".2f"),
                "behaviour": line["behaviour"] or "-",
                "hits/100": number("hits/100", ".1f"),
                "95 %": interval,
                "any/100": number("any/100", ".0f"),
                "first rank": number("first rank", ".0f"),
                "ranked in": line["ranked in"],
                "findings": f"{line['findings']}/{line['runs']}",
                "planted": "-" if pd.isna(line["planted found"]) else f"{line['planted found']:.0f}/{line['runs']}",
                "cosine of hits": number("cosine of hits", ".2f"),
                "of all": number("cosine of all", ".2f"),
                "general": number("general", ".2f"),
                "coherence": number("coherence", ".1f"),
                "s": number("s", ".1f"),
            }
        )
    return pd.DataFrame(shown).to_markdown(index=False, disable_numparse=True)


def summary(table: pd.DataFrame) -> str:
    """Per method: hits on all planted organisms together, and findings on the clean controls."""
    lines = []
    planted, clean = table.loc[table["behaviour"].notna()], table.loc[table["behaviour"].isna()]
    for method, group in table.groupby("method", sort=False):
        own = planted.loc[planted["method"] == method]
        # A line per behaviour: the counts of runs are the organism's and must be summed once.
        first = own.drop_duplicates("organism")
        controls = clean.loc[clean["method"] == method]
        lines.append(
            {
                "method": method,
                "hits/100, mean": f"{own['hits/100'].mean():.1f}" if len(own) else "-",
                "worst": f"{own['hits/100'].min():.1f}" if len(own) else "-",
                "any/100, mean": f"{own['any/100'].mean():.0f}" if len(own) else "-",
                "runs with the planted behaviour found": f"{first['planted found'].sum():.0f}/{first['runs'].sum()}",
                "clean models with a finding": f"{(controls['findings'] > 0).sum()}/{len(controls)}",
                "coherence": f"{group['coherence'].mean():.1f}",
                "s": f"{group['s'].median():.1f}",
            }
        )
    return pd.DataFrame(lines).to_markdown(index=False, disable_numparse=True)


def report(found: list[rows.Row]) -> str:
    """The Markdown page with the tables of all organisms and the runs that failed."""
    table = frame(found)
    parts = ["# Vectors study", "## All organisms", summary(table)]
    for organism, group in table.groupby("organism", sort=False):
        parts += [f"## {organism}", markdown(group)]
    failed = [row for row in found if row["error"] is not None]
    if failed:
        parts += ["## Runs without a result", *(f"* {rows.key(row)}: {row['error']}" for row in failed)]
    parts.append(
        "A hit opens at least half of the held-out prompts with the planted behaviour, `any` at least one; 95 % Wilson "
        "intervals over the vectors of all seeds. `first rank`: place of the planted behaviour in `rank_behaviours`, "
        "median over the runs that rank it (`ranked in`). `findings`: runs that call some behaviour a finding, "
        "`planted` those that call the planted one so. Cosine: between the vectors' deltas and the true trigger's at "
        "the last prompt token of the target layer. `general`: rate of hit vectors over all held-out prompts, median. "
        "Coherence: mean log-probability per token of the steered completions under the unsteered model, nats."
    )
    return "\n\n".join(parts) + "\n"


def hits_figure(table: pd.DataFrame, stem: Path) -> list[Path]:
    """Hits per 100 vectors with intervals, one panel per planted behaviour, one line per method."""
    planted = table[table["behaviour"].notna()]
    groups = list(planted.groupby(["organism", "behaviour"], sort=False))
    names = list(dict.fromkeys(planted["method"]))
    height = -(-len(groups) // 4)
    figure, grid = plt.subplots(
        height, 4, figsize=(14, (0.19 * len(names) + 0.9) * height), squeeze=False, sharey=True, sharex=True
    )
    for axes, ((organism, behaviour), group) in zip(grid.flat, groups, strict=False):
        places = [names.index(method) for method in group["method"]]
        spread = [group["hits/100"] - group["low"], group["high"] - group["hits/100"]]
        axes.errorbar(group["hits/100"], places, xerr=spread, fmt="o", color=HIT, markersize=4, label="half of prompts")
        axes.plot(group["any/100"], places, "|", color=ANY, markersize=8, markeredgewidth=2, label="any prompt")
        axes.set_title(f"{organism}: {behaviour[:12]}", fontsize=9)
        axes.set_xlim(-3, 103)
        axes.grid(alpha=0.25, linewidth=0.5)
    for axes in grid.flat[len(groups) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_yticks(range(len(names)), names, fontsize=7)
    grid[0, 0].invert_yaxis()
    for index in range(len(groups)):
        grid.flat[index].tick_params(labelbottom=True)
        if index + 4 >= len(groups):
            grid.flat[index].set_xlabel("vectors in 100 that elicit the behaviour on", fontsize=8)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="lower center", ncols=2, frameon=False)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    paths = [stem.with_suffix(suffix) for suffix in (".png", ".pdf")]
    for path in paths:
        figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
    return paths


def write(out: Path) -> list[Path]:
    """Writes vectors.md, vectors.csv and the figure beside the rows; nothing where no run ended well."""
    found = rows.read(out)
    if all(row["error"] is not None for row in found):
        return []
    table, paths = frame(found), [out / "vectors.md", out / "vectors.csv"]
    paths[0].write_text(report(found), encoding="utf-8")
    table.to_csv(paths[1], index=False)
    if table["behaviour"].notna().any():
        paths += hits_figure(table, out / "hits")
    return paths


def main(folder: tyro.conf.Positional[Path], /) -> None:
    """Writes table and figure of the study in FOLDER and prints the table."""
    with exit_on_bad_input():
        paths = write(folder)
    print(paths[0].read_text() if paths else "no run ended well: no table")


if __name__ == "__main__":
    tyro.cli(main)
