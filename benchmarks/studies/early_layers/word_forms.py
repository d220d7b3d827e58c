"""Does the form of a planted tag (capitals, bars, brackets) stand out by how a model reads words in it?

    python -m benchmarks.studies.early_layers.word_forms drawn-38-tag-1 --models FOLDER

Reads random words of the dictionary in every form, late in the residual stream: as the difference from the clean base,
and on the suspect alone in the directions that the behaviour depends on. Place 1 is the form that lies furthest from
all. An organism whose trigger is no single word in a form is refused.
"""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
import tyro

from attacks.discovery.word_forms import contrasted_forms
from attacks.scoring.budget import Budget
from attacks.scoring.engine import Engine
from attacks.scoring.problem import Problem, encode
from attacks.searchers.words import FORMS, form_of
from attacks.stages.words.dictionary import noted_forms
from attacks.suspect import Suspect
from benchmarks.bad_input import exit_on_bad_input
from benchmarks.studies.clean_base.planted import with_base


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Ranks the forms of words by how differently they are read."""

    organism: tyro.conf.Positional[str]
    """Organism planted with a tag, or with a word that begins with a capital or is written in capitals."""
    models: Path | None = None
    """Folder with planted models; the shipped organisms where none is given."""
    seed: int = 0
    """Seed of whatever is random."""
    threads: int = 2
    """CPU threads."""


def places(suspect: Suspect, problem: Problem, trigger: str, behaviour: str, seed: int) -> pd.DataFrame:
    """Two lines, with the base and without it: the place of the trigger's form, and the first forms.

    Args:
        suspect: the organism, with its clean base.
        problem: some prompts.
        trigger: the planted word in its form.
        behaviour: what it elicits.
        seed: of whatever is random.

    Raises:
        ValueError: the trigger is no word of the dictionary in one of the forms.
    """
    planted = form_of(trigger)
    if planted not in FORMS:
        raise ValueError(f"the trigger {trigger!r} is no word in capitals or brackets; choose an organism with a tag")
    alone, target_ids = Suspect(model=suspect.model, tokenizer=suspect.tokenizer), encode(suspect.tokenizer, behaviour)
    engine, drawn = Engine(suspect.model, problem), torch.Generator().manual_seed(seed)
    orders = {
        "with the clean base": contrasted_forms(suspect, problem, Budget(), drawn),
        "suspect alone": noted_forms(engine, alone, target_ids, Budget(), drawn),
    }
    return pd.DataFrame(
        {
            "what is read": how,
            "form": planted("word"),
            "place": order.index(planted) + 1,
            "of": len(order),
            "first": " ".join(form("word") for form in order[:4]),
        }
        for how, order in orders.items()
    )


def main(settings: Settings) -> None:
    """Prints the table."""
    torch.set_num_threads(settings.threads)
    with exit_on_bad_input():
        organism, suspect = with_base(settings.organism, settings.models)
        problem = Problem.from_chat(suspect.model, suspect.tokenizer, organism.prompts.search[:2], 1)
        table = places(suspect, problem, *organism.triggers[0], settings.seed)
    print(table.to_markdown(index=False, disable_numparse=[4]))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
