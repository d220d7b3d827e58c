"""Which behaviours does K0 find, and how far does the planted one stand out? No trigger is searched.

python -m benchmarks.studies.discovery
"""

from dataclasses import dataclass

import torch
import tyro
from rich.console import Console
from rich.table import Table

from attacks.discovery.unsupervised import Unsupervised
from attacks.scoring.budget import Budget
from attacks.scoring.slot_markers import without_slot
from attacks.suspect import Suspect
from benchmarks.bad_input import exit_on_bad_input
from benchmarks.organisms import zoo
from benchmarks.run import related


@dataclass(frozen=True, slots=True, kw_only=True)
class Discovery:
    """Settings of the measurement."""

    organisms: tuple[str, ...] = zoo.NAMES
    """names of the planted models and clean controls"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """seeds of the vectors, one measurement each"""
    top: int = 5
    """number of candidates shown per run, findings or not"""
    threads: int = 2
    """number of CPU threads"""


def main(settings: Discovery) -> None:
    """Prints the best candidates of every run, then how often the planted behaviour was a finding."""
    torch.set_num_threads(settings.threads)
    with exit_on_bad_input():
        for name in settings.organisms:
            zoo.check_name(name)
    names = ("organism", "seed", "behaviour", "score", "votes", "reach", "nats", "certainty", "finding", "planted")
    table, method = Table(*names), Unsupervised()
    hits = false = 0
    for name in settings.organisms:
        organism = zoo.load(name)
        suspect = Suspect(model=organism.model, tokenizer=organism.tokenizer)
        for seed in settings.seeds:
            texts = without_slot(organism.prompts.search)
            # So long that it never ends a round: what discovery finds is measured, not how fast.
            budget, generator = Budget(seconds=3600.0), torch.Generator().manual_seed(seed)
            found = method.candidates(suspect, texts, budget, generator, 1.0)[0][: settings.top]
            # A completion may begin with the planted text and go on, or hold its first words only.
            planted = [any(related(truth, item.text) for _, truth in organism.triggers) for item in found]
            findings = [method.is_finding(item) for item in found]
            hits += any(a and b for a, b in zip(planted, findings, strict=True))
            # On a clean control every finding is false, whatever it says.
            false += any(findings) and not organism.triggers
            for item, is_planted, finding in zip(found, planted, findings, strict=True):
                numbers = [f"{value:.2f}" for value in (item.reach, item.surprise, item.certainty)]
                marks = ["yes" if mark else "" for mark in (finding, is_planted)]
                table.add_row(name, str(seed), repr(item.text), f"{item.score:.2f}", str(item.votes), *numbers, *marks)
    Console().print(table)
    runs = len(settings.organisms) * len(settings.seeds)
    print(f"planted behaviour among the findings in {hits} of {runs} runs; findings on clean controls in {false}")


if __name__ == "__main__":
    main(tyro.cli(Discovery, description=__doc__))
