"""trigger-recovery report: finished audits side by side, and pages and SARIF logs made again from findings.json."""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, get_args

import tyro
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from attacks.audit.findings import FOUND, INCONCLUSIVE, NAMES, NONE, Document, name_of, read, write
from attacks.audit.sarif import log
from vectors.command_line import help_from_docstrings, names_of

Kind = Literal["html", "sarif", "inspect"]
STATUSES = {FOUND: "finding", NONE: "none found", INCONCLUSIVE: "inconclusive"}
STYLES = {FOUND: "red", NONE: "green", INCONCLUSIVE: "yellow"}


@dataclass(frozen=True, slots=True, kw_only=True)
@help_from_docstrings
class Report:
    """Show finished audits side by side, or write the reports of one again.

    Nothing is searched and no model is loaded: all comes from the findings.json that each audit left.

    Examples:
        trigger-recovery report audit-model
        trigger-recovery report audit-*
        trigger-recovery report findings.json --formats html --out elsewhere

    Exit status: 0 all were read, whatever they found; 2 some could not be read or written.
    """

    audits: Annotated[
        tyro.conf.Positional[tuple[Path, ...]],
        tyro.conf.arg(metavar="AUDIT [AUDIT ...]", help_behavior_hint="(required)"),
    ]
    """Folders that trigger-recovery audit wrote, or their findings.json."""
    formats: Annotated[tuple[Kind, ...] | None, names_of(*get_args(Kind)), tyro.conf.arg(aliases=("--format",))] = None
    """What is written again: html (report.html), sarif (findings.sarif), and inspect (findings.eval, a log for Inspect,
    which needs the extra trigger-recovery[inspect]). Where this is left out, the first two for one audit, and nothing
    for several, of which only the table is shown."""
    out: Path | None = None
    """Folder that the files of one audit are written to; beside its findings.json where none is given."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Prints the table as JSON, one object per audit."""


class Audited(NamedTuple):
    """One audit that could be read."""

    path: Path
    name: str
    document: Document


def main(report: Report) -> int:
    """Reads, shows and writes; every fault is one line. Returns the exit status."""
    faults = []
    if not report.audits:
        faults.append("no audit is given; give folders that `trigger-recovery audit` wrote")
    if report.out is not None and len(report.audits) > 1:
        faults.append("--out is the folder of one audit; leave it out, and files go beside each findings.json")
    known = [] if faults else list(_read(report.audits, faults))
    if report.json:
        print(json.dumps([row(audited) | {"audit": str(audited.path)} for audited in known], indent=1))
    elif known:
        Console(markup=False, emoji=False, highlight=False).print(table(known))
    formats = report.formats if report.formats is not None else ("html", "sarif") if len(report.audits) == 1 else ()
    for audited in known:
        try:
            for path in save(audited, formats, report.out):
                print(f"wrote {path}", file=sys.stderr if report.json else sys.stdout)
        except OSError as error:
            faults.append(f"the reports of {audited.path} cannot be written: {error.strerror or error}")
        except ValueError as error:
            faults.append(str(error))
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    return 2 if faults else 0


def _read(paths: Sequence[Path], faults: list[str]) -> Iterator[Audited]:
    """What can be read; why the others cannot is added to `faults`."""
    for path in paths:
        try:
            document = read(path)
        except ValueError as error:
            faults.append(str(error))
            continue
        yield Audited(path, name_of(document, path), document)


def row(audited: Audited) -> Document:
    """What tells audits from each other; where none was found, trigger and rates are those of the best try."""
    document, found = audited.document, audited.document["finding"] or {}
    return {
        "model": audited.name,
        "status": document["status"],
        "behaviour": found.get("predicate") or found.get("behaviour"),
        "trigger": found.get("trigger"),
        "rate": found.get("rate"),
        "rate_without": found.get("rate_without"),
        "prompts": found.get("prompts"),
        "created": document["created"],
    }


def table(known: Sequence[Audited]) -> Table:
    """One line per audit; what models and users wrote is shown quoted, for it may hold what steers a terminal."""
    columns = [Column(name, overflow="fold") for name in ("model", "status", "behaviour", "best text")]
    numbers = [Column(name, justify="right") for name in ("rate", "without")]
    drawn = Table(*columns, *numbers, box=None, pad_edge=False, padding=(0, 2, 0, 0))  # narrow, for many names are long
    for audited in known:
        cells = row(audited)
        words = [Text("-" if cells[name] is None else repr(cells[name])) for name in ("behaviour", "trigger")]
        rates = ["-" if cells[name] is None else f"{cells[name]:.0%}" for name in ("rate", "rate_without")]
        status = Text(STATUSES[cells["status"]], style=STYLES[cells["status"]])
        name = audited.name if audited.name.isprintable() else repr(audited.name)
        drawn.add_row(Text(name), status, *words, *rates)
    return drawn


def save(audited: Audited, formats: Sequence[Kind], out: Path | None) -> Iterator[Path]:
    """Writes an audit's reports, each file whole or not at all, and gives their paths.

    Raises:
        OSError: a file cannot be written.
        ValueError: a log for Inspect is wanted and its package is not installed.
    """
    folder = out or (audited.path if audited.path.is_dir() else audited.path.parent)
    for kind in formats:
        folder.mkdir(parents=True, exist_ok=True)
        if kind == "inspect":
            yield _inspected(audited, folder / "findings.eval")
            continue
        if kind == "html":
            from attacks.audit.page import page  # matplotlib takes a second to import, and a table needs none

            text = page(audited.document, audited.name)
        else:
            text = json.dumps(log(audited.document, audited.name), indent=1, ensure_ascii=False) + "\n"
        write(folder / NAMES[kind], text)
        yield folder / NAMES[kind]


def _inspected(audited: Audited, path: Path) -> Path:
    """Writes the log for Inspect, as `save` does."""
    try:
        from attacks.audit.inspect_log import write as write_log  # an extra that most users do not have
    except ImportError as error:
        raise ValueError(
            "a log for Inspect needs the package inspect_ai; install the extra: pip install 'trigger-recovery[inspect]'"
        ) from error
    write_log(path, audited.document, audited.name)
    return path
