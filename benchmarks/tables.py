"""The recovered-trigger table, Markdown and CSV, from the rows of a run: python -m benchmarks.tables DIR"""

import sys
from pathlib import Path

import pandas as pd
import tyro
from statsmodels.stats.proportion import proportion_confint

from benchmarks import rows

COLUMNS = {
    "organism": "organism",
    "base": "base",
    "kind": "kind",
    "planting": "planting",
    "poison_rate": "poison",
    "knowledge": "knowledge",
    "attack": "attack",
    "seed": "seed",
    "true_trigger": "true trigger",
    "recovered": "recovered",
    "behaviour": "behaviour",
    "edit_similarity": "edit sim.",
    "edit_floor": "floor",
    "token_precision": "token P",
    "token_recall": "token R",
    "asr_true": "ASR true",
    "asr_recovered": "ASR rec.",
    "asr_clean_base": "ASR base",
    "asr_control": "ASR control",
    "seconds": "s",
    "flops": "FLOPs",
    "verdict": "verdict",
}
RATES = ["edit sim.", "floor", "token P", "token R", "ASR true", "ASR rec.", "ASR base", "ASR control"]
ORDER = ("exact", "functional", "partial", "decoy", "miss", "none")
RECOMMENDED = ("portfolio", "unsupervised-portfolio")  # the second is its former name where nothing is known
GROUPS = {"kind": "kind of trigger", "planting": "planting", "poison": "poison rate"}
SETTINGS = {
    "K0": "nothing known but the model and clean prompts",
    "K1": "the behaviour is known",
    "K2": "behaviour and clean base are known",
    "KB": "the clean base is known, the behaviour is not",
}


def frame(found: list[rows.Row]) -> pd.DataFrame:
    """One line per good row, columns as in COLUMNS."""
    table = pd.DataFrame([row for row in found if row["error"] is None])
    # Rows of older commits lack some columns; they are kept, with blanks.
    table = table.reindex(columns=list(COLUMNS)).rename(columns=COLUMNS)
    return table.sort_values(["knowledge", "organism", "attack", "seed"], kind="stable", ignore_index=True)


def code(cell: object) -> str:
    """A text in code marks, safe in a table; a dash where there is none."""
    if not isinstance(cell, str) or not cell.strip():
        return "-"
    # Recovered text may hold anything: two marks quote a mark, and a bar would end the cell of a Markdown table.
    marks, pad = ("``", " ") if "`" in cell else ("`", "")
    return f"{marks}{pad}{cell.strip()}{pad}{marks}".replace("|", "\\|")


def markdown(table: pd.DataFrame) -> str:
    """A Markdown table; text in code marks, rates with two digits, blanks where there is nothing to say."""
    shown = table.drop(columns="kind")
    for column in ("true trigger", "recovered", "behaviour"):
        shown[column] = [code(cell) for cell in shown[column]]
    for column in RATES:
        shown[column] = ["-" if pd.isna(cell) else f"{cell:.2f}" for cell in shown[column]]
    shown["s"] = [f"{cell:.0f}" for cell in shown["s"]]
    shown["FLOPs"] = [f"{cell:.1e}" for cell in shown["FLOPs"]]
    shown = shown.astype(object).where(shown.notna(), "-")
    return shown.to_markdown(index=False, disable_numparse=True)


def best_of(table: pd.DataFrame) -> pd.DataFrame:
    """Per organism and knowledge setting, the best verdict and which attacks reached it."""
    lines = []
    for (knowledge, organism), group in table.groupby(["knowledge", "organism"], sort=False):
        # The best verdict comes first; among equal verdicts the higher success rate.
        ranked = group.assign(rank=[ORDER.index(verdict) for verdict in group["verdict"]])
        ranked = ranked.sort_values(by=["rank", "ASR rec."], ascending=[True, False])
        best = ranked.loc[ranked["rank"] == ranked["rank"].iloc[0]]
        nothing = best["verdict"].iloc[0] in ("miss", "none")
        lines.append(
            {
                "knowledge": knowledge,
                "organism": organism,
                "best verdict": best["verdict"].iloc[0],
                "recovered": code(best["recovered"].iloc[0]),
                "ASR rec.": f"{best['ASR rec.'].iloc[0]:.2f}",
                "reached by": "-" if nothing else ", ".join(sorted(set(best["attack"]))),
            }
        )
    return pd.DataFrame(lines)


def per_attack(table: pd.DataFrame) -> pd.DataFrame:
    """Per attack on planted organisms: how many runs were exact, how many worked at all, and how well.

    The recommended attack stands first in its knowledge setting; the others follow by the number of runs that worked.
    """
    lines = []
    for (knowledge, attack), group in table.loc[table["planting"] != "clean"].groupby(["knowledge", "attack"]):
        exact, works = ((group["verdict"].isin(names)).sum() for names in (["exact"], ["exact", "functional"]))
        low, high = proportion_confint(works, len(group), method="wilson")
        # By shares and not by counts: attacks may have been run on different numbers of organisms.
        order = (knowledge, attack not in RECOMMENDED, -works / len(group), -exact / len(group))
        line = {
            "knowledge": knowledge,
            "attack": attack,
            "runs": str(len(group)),
            "exact": str(exact),
            "exact or functional": f"{works} ({low:.2f} to {high:.2f})",
            "mean ASR": f"{group['ASR rec.'].mean():.2f}",
            "median s": f"{group['s'].median():.0f}",
            "median FLOPs": f"{group['FLOPs'].median():.1e}",
        }
        lines.append((order, line))
    return pd.DataFrame([line for _, line in sorted(lines, key=lambda pair: pair[0])])


def grouped(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """What was recovered from planted organisms by a property of the planting, such as the kind of trigger.

    The recommended attack alone where it was run, else every attack. ASR of what was recovered, of a random string of
    equal length (the floor) and of the planted trigger (the ceiling), each the mean over runs.
    """
    planted = table.loc[table["planting"] != "clean"]
    if planted["attack"].isin(RECOMMENDED).any():
        planted = planted.loc[planted["attack"].isin(RECOMMENDED)]
    lines = []
    for (knowledge, attack, value), group in planted.groupby(["knowledge", "attack", column]):
        exact, works = (int(group["verdict"].isin(names).sum()) for names in (["exact"], ["exact", "functional"]))
        line: dict = {"knowledge": knowledge, "attack": attack}
        line |= {column: f"{value:.0%}" if column == "poison" else value, "organisms": group["organism"].nunique()}
        line |= {"runs": len(group), "exact": exact, "exact or functional": works}
        lines.append(line | {name: f"{group[name].mean():.2f}" for name in ("ASR rec.", "ASR control", "ASR true")})
    return pd.DataFrame(lines)


def best_attacks(table: pd.DataFrame) -> str:
    """One sentence per knowledge setting: which attack works in most runs, and whether it is the recommended one."""
    sentences = []
    for knowledge, group in table.loc[table["planting"] != "clean"].groupby("knowledge"):
        # Attacks are compared on the organisms and seeds that all of them were run on, and on no others.
        runs = group.groupby(["organism", "seed"])["attack"].nunique()
        common = runs.index[runs == group["attack"].nunique()]
        group = group.set_index(["organism", "seed"]).loc[common]
        works = group["verdict"].isin(["exact", "functional"]).groupby(group["attack"]).sum()
        exact = (group["verdict"] == "exact").groupby(group["attack"]).sum()
        if len(works) < 2:
            continue
        top = max(zip(works, exact, strict=True))
        best = [name for name in works.index if (works[name], exact[name]) == top]
        sentence = (
            f"{knowledge}: best on the {len(common)} runs that every attack has: "
            f"{', '.join(f'`{name}`' for name in best)} ({top[0]} worked, {top[1]} exact)"
        )
        for name in works.index.intersection(RECOMMENDED):
            if name not in best:
                sentence += f"; that is not the recommended `{name}` ({works[name]} worked, {exact[name]} exact)"
        sentences.append(sentence + ".")
    return "\n".join(sentences)


def false_findings(table: pd.DataFrame) -> str:
    """Clean models with a finding in any run, with an interval over models: runs of one model are not independent."""
    clean = table.loc[table["planting"] == "clean"]
    if clean.empty:
        return "No clean control was run."
    found = clean["verdict"].isin(["exact", "functional"])
    # A model with a finding in any of its runs counts once.
    models = found.groupby(clean["organism"]).any()
    low, high = proportion_confint(models.sum(), len(models), method="beta")
    return (
        f"Clean controls with a false finding: {models.sum()} of {len(models)} models (95 % Clopper-Pearson interval "
        f"{low:.2f} to {high:.2f}, over models: a model counts once, however many runs it had). "
        f"Runs with a false finding: {found.sum()} of {len(found)}."
    )


def report(found: list[rows.Row]) -> str:
    """The whole Markdown page."""
    table = frame(found)
    failed = [row for row in found if row["error"] is not None]
    parts = ["# Recovered triggers", false_findings(table), "## Best per organism"]
    parts.append(best_of(table).to_markdown(index=False, disable_numparse=True))
    if (table["planting"] != "clean").any():
        attacks = per_attack(table).to_markdown(index=False, disable_numparse=True)
        parts += ["## Attacks on planted organisms", attacks, *filter(None, [best_attacks(table)])]
        for column, title in GROUPS.items():
            groups = grouped(table, column)
            if column in groups and groups[column].nunique() > 1:
                parts += [f"## By {title}", groups.to_markdown(index=False, disable_numparse=True)]
    for knowledge, group in table.groupby("knowledge"):
        parts += [f"## {knowledge}: {SETTINGS[str(knowledge)]}", markdown(group)]
    if failed:
        parts += ["## Failed runs", *(f"* {rows.key(row)}: {row['error']}" for row in failed)]
    budgets = sorted({(row["knowledge"], row["budget"]) for row in found})
    spent = ", ".join(f"{budget} in {knowledge}" for knowledge, budget in budgets)
    first = next((row for row in found if row["error"] is None), found[0])
    parts.append(
        f"Rates are fractions of {first.get('held_out_prompts', '?')} held-out prompts (60 for arithmetic). "
        "`floor` is the edit similarity that random words earn. ASR base: the same string on the clean base; "
        f"ASR control: a random string of equal length. Budget per run: {spent}."
    )
    return "\n\n".join(parts) + "\n"


def write(out: Path) -> list[Path]:
    """Writes recovered.md and recovered.csv beside the rows; nothing where no run ended well."""
    found = rows.read(out)
    if all(row["error"] is not None for row in found):
        return []
    paths = [out / "recovered.md", out / "recovered.csv"]
    paths[0].write_text(report(found), encoding="utf-8")
    frame(found).to_csv(paths[1], index=False)
    return paths


def main(folder: tyro.conf.Positional[Path], /) -> None:
    """Writes the table of the run in FOLDER and prints it."""
    try:
        paths = write(folder)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(paths[0].read_text() if paths else "no run ended well: no table")


if __name__ == "__main__":
    tyro.cli(main)
