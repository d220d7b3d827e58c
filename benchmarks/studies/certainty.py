"""How surely do planted triggers elicit their behaviour, and how surely does what works beside them?

    python -m benchmarks.studies.certainty --rows benchmarks/results/portfolio-on-shipped
    python -m benchmarks.studies.certainty --rows benchmarks/results/drawn-sixteen/fixed --models FOLDER --slot start

For each organism: nats of the whole behaviour behind random strings (median), behind the planted trigger, and behind
every other string that attacks recovered there and that works (from rows), as shares of the first. `SURE` in
`attacks.judging.judge` is a threshold on these shares. With another slot than random places the same is measured there:
what a search found at the end of prompts is often less sure at other places than the planted trigger.

The last column is what the report would make of the planted trigger, if it were found, by exchanging its words for
dictionary words that they begin with: the planted trigger itself, or the rule costs it.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.table import Table

from attacks.attack import ATTACKS
from attacks.discovery.goal import Goal
from attacks.judging.judge import SURE, Judge
from attacks.judging.report import of_shorter_words
from attacks.scoring.budget import Budget
from attacks.scoring.problem import encode
from attacks.scoring.slot_markers import Where
from attacks.suspect import Suspect
from benchmarks import rows
from benchmarks.organisms import zoo


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Compare how surely planted and other working triggers elicit a behaviour."""

    rows: tuple[Path, ...] = (Path("benchmarks/results/portfolio-on-shipped"),)
    """folders with rows.jsonl, from which other working strings are taken"""
    organisms: tuple[str, ...] = zoo.NAMES
    """names of the organisms to measure; clean controls are passed over"""
    models: Path | None = None
    """folder of planted models, where the organisms are not shipped ones"""
    slot: Where = "random"
    """where the strings stand in prompts that do not mark it"""
    threads: int = 1
    """number of CPU threads"""


def judge_of(name: str, models: Path | None, slot: Where) -> tuple[Judge, zoo.Organism]:
    """The judge that an attack would have on this organism, certain at that slot, and the organism."""
    organism = zoo.load(name, models=models)
    suspect = Suspect(model=organism.model, tokenizer=organism.tokenizer)
    engine = suspect.engine(organism.prompts.search[:2], ATTACKS["portfolio"].longest)
    prompts = organism.prompts
    behaviour, texts = organism.triggers[0][1], [*prompts.search, *prompts.select]
    anywhere = suspect.engine_of_random_places(texts, engine)
    if anywhere is not None and slot != "random":
        anywhere = suspect.engine(texts, engine.problem.trigger_length, slot=slot)
    return Judge(
        suspect=suspect,
        engine=suspect.engine(prompts.select, engine.problem.trigger_length),
        base_engine=None,
        anywhere=anywhere,
        goal=Goal(behaviour=behaviour, target_ids=tuple(encode(organism.tokenizer, behaviour))),
        enough=1.0,
        budget=Budget(seconds=3600.0),
        trace=[],
    ), organism


def main(settings: Settings) -> None:
    """Prints one line per organism."""
    torch.set_num_threads(settings.threads)
    found = [row for folder in settings.rows for row in rows.read(folder) if row["error"] is None]
    table = Table("organism", "random, nats", "planted, share", "others that work, shares", "reported")
    for name in settings.organisms:
        if not zoo.load(name, models=settings.models).triggers:
            continue
        judge, organism = judge_of(name, settings.models, settings.slot)
        # Behaviours differ in length and likelihood: only the share of what random strings leave compares models.
        scale, problem = judge.nats_of_random(), (judge.anywhere or judge.engine).problem
        others = {row["recovered"] for row in found if row["organism"] == name and row["verdict"] == "functional"}
        planted = judge.nats(tuple(problem.encode(organism.triggers[0][0]))) / scale
        shares = sorted(judge.nats(tuple(problem.encode(text))) / scale for text in others)
        told = ", ".join(f"{share:.4f}" for share in shares)
        table.add_row(name, f"{scale:.1f}", f"{planted:.4f}", told, of_shorter_words(judge, organism.triggers[0][0]))
    console = Console(markup=False, emoji=False, highlight=False)
    console.print(table)
    console.print(f"SURE is {SURE}")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
