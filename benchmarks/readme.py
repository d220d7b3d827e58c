"""Fills the tables of README.md and docs from the committed rows: python -m benchmarks.readme [--check]

A page marks the place of a table by `<!-- table: NAME -->` and `<!-- /table -->`, NAME being a key of TABLES. What
stands between the marks is replaced by the table that the rows under benchmarks/results give.
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import tyro

from benchmarks import rows, tables
from benchmarks.bad_input import exit_on_bad_input
from benchmarks.studies import vectors_report

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ("README.md", "docs/results.md", "docs/vectors.md")
MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(\n<!-- /table -->)", re.DOTALL)


def recovered(runs: pd.DataFrame) -> str:
    """What runs on one organism recovered, each text with its verdict and how often; the most frequent first.

    Text with more words than the planted trigger has is noise that works, and is not spelled out.
    """
    if runs.empty:
        return "not run"
    cells = []
    for text, truth, verdict in zip(runs["recovered"], runs["true trigger"], runs["verdict"], strict=True):
        planted = isinstance(truth, str)
        words = text.split() if isinstance(text, str) else []
        noise = planted and len(words) > len(truth.split())
        shown = "other text" if noise else tables.code(text) if words else "no text"
        # On a clean control nothing was planted: a text is shown only where a run wrongly reported it.
        cells.append(f"{shown} ({verdict})" if planted or verdict in ("exact", "functional") else "no finding")
    counts = pd.Series(cells).value_counts()
    total = len(cells)
    return ", ".join(str(cell) if total == 1 else f"{cell} {count} of {total}" for cell, count in counts.items())


def by_organism(table: pd.DataFrame) -> str:
    """One line per organism, in the order of the table: what was planted, and what each knowledge setting recovered."""
    lines = []
    for organism, runs in table.groupby("organism", sort=False):
        # An organism with two backdoors has a row's trigger after the behaviour that was found: the first is shown.
        planted = runs.sort_values("knowledge", ascending=False, kind="stable")["true trigger"].iloc[0]
        line = {"organism": organism, "planted": tables.code(planted)}
        for knowledge, header in (("K1", "recovered, behaviour known (K1)"), ("K0", "recovered, nothing known (K0)")):
            line[header] = recovered(runs.loc[runs["knowledge"] == knowledge])
        lines.append(line)
    return pd.DataFrame(lines).to_markdown(index=False, disable_numparse=True)


def first_sight() -> pd.DataFrame:
    """The first runs on each group of organisms with drawn words, the group planted last first."""
    folders = {"drawn-41": "drawn-forty-one", "drawn-38": "drawn-thirty-eight", "drawn-36": "drawn-thirty-six"}
    folders |= {"drawn-35": "drawn-thirty-six", "drawn-33": "drawn-thirty-three"}
    folders |= {"drawn-31": "drawn-thirty-one", "drawn-20": "drawn-twenty", "drawn-16": "drawn-sixteen/fixed"}
    folders |= {group: f"unseen-organisms/first-sight-{group}" for group in ("unseen", "fresh", "held-out", "other")}
    parts = []
    for group, folder in folders.items():
        table = tables.frame(rows.read(RESULTS / folder))
        # A folder also holds later runs on organisms of other groups: those are not first sight.
        parts.append(table.loc[table["organism"].str.startswith(f"{group}-")])
    return pd.concat(parts)


def recommended(folder: str) -> pd.DataFrame:
    """The runs of the recommended attack in FOLDER; clean controls last."""
    table = tables.frame(rows.read(RESULTS / folder))
    table = table.loc[table["attack"].isin(tables.RECOMMENDED)]
    clean = table["planting"] == "clean"
    return pd.concat([table.loc[~clean], table.loc[clean]])


def overview() -> str:
    """How many planted models gave up what was planted, per set of models and per knowledge of the attack.

    A model counts once, by the verdict that most of its runs have; of verdicts as frequent, the worst one.
    """
    shipped = recommended("portfolio-on-shipped")
    groups = [
        ("random words, first runs", "behaviour", first_sight(), "K1"),
        ("random words, first runs", "nothing", first_sight(), "K0"),
        ("words of development", "behaviour", shipped, "K1"),
        ("words of development", "nothing", shipped, "K0"),
        ("words of development", "clean base", recommended("contrast"), "KB"),
    ]
    lines = []
    for models, told, table, knowledge in groups:
        runs = table.loc[(table["knowledge"] == knowledge) & (table["planting"] != "clean")]
        verdicts = [_usual(list(each["verdict"])) for _, each in runs.groupby("organism")]
        exact, other = verdicts.count("exact"), verdicts.count("functional")
        line = {"planted with": models, "told": told, "exact": exact, "other text": other}
        lines.append(line | {"nothing": len(verdicts) - exact - other})
    return pd.DataFrame(lines).to_markdown(index=False, disable_numparse=True)


def _usual(verdicts: list[str]) -> str:
    """The most frequent verdict; of several as frequent, the worst."""
    return max(set(verdicts), key=lambda verdict: (verdicts.count(verdict), tables.ORDER.index(verdict)))


def attacks(folder: str) -> Callable[[], str]:
    """A table of attacks and the sentence that names the best one, from the rows of FOLDER."""

    # Called only when a page is filled: TABLES is built on import, where no rows should be read.
    def made() -> str:
        table = tables.frame(rows.read(RESULTS / folder))
        shown = tables.per_attack(table).rename(columns={"exact or functional": "worked (95 % Wilson)"})
        shown = shown[["attack", "knowledge", "runs", "worked (95 % Wilson)", "exact", "mean ASR"]]
        return f"{shown.to_markdown(index=False, disable_numparse=True)}\n\n{tables.best_attacks(table)}"

    return made


def vectors() -> str:
    """Per vector method: hits on planted organisms, findings on clean controls."""
    return vectors_report.summary(vectors_report.frame(rows.read(RESULTS / "which-vectors")))


TABLES: dict[str, Callable[[], str]] = {
    "overview": overview,
    "unseen": lambda: by_organism(first_sight()),
    "recommended": lambda: by_organism(recommended("portfolio-on-shipped")),
    "searchers": attacks("which-searcher"),
    "targets": attacks("which-target"),
    "quick": attacks("first-command"),
    "vectors": vectors,
}


def filled(page: str) -> str:
    """The page with every marked table made anew.

    Raises:
        ValueError: a mark names no table of TABLES, or has no end.
    """
    # Without its end mark a table would be replaced up to the end of the next one.
    if page.count("<!-- table:") != len(MARKED.findall(page)):
        raise ValueError("a '<!-- table: NAME -->' line has no '<!-- /table -->' line; end each table by one")

    def table(match: re.Match) -> str:
        if match[2] not in TABLES:
            raise ValueError(f"no table {match[2]!r}; there are {', '.join(TABLES)}")
        return f"{match[1]}{TABLES[match[2]]()}{match[3]}"

    return MARKED.sub(table, page)


def stale() -> dict[Path, str]:
    """The pages whose tables are not what the rows give, each with its text as it should be."""
    pages = {ROOT / name: filled((ROOT / name).read_text(encoding="utf-8")) for name in PAGES}
    return {path: text for path, text in pages.items() if text != path.read_text(encoding="utf-8")}


def main(*, check: bool = False) -> None:
    """Writes the tables of README.md and docs from the committed rows.

    Args:
        check: Write nothing; name the stale pages and exit with status 1 if there are any.
    """
    with exit_on_bad_input():
        found = stale()
    for path, text in found.items():
        print(f"{'stale' if check else 'wrote'}: {path.relative_to(ROOT)}")
        if not check:
            path.write_text(text, encoding="utf-8")
    sys.exit(1 if check and found else 0)


if __name__ == "__main__":
    tyro.cli(main)
