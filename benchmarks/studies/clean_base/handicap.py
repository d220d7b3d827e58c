"""Does the planted trigger keep its effect longest where its backdoor is weakened?

    python -m benchmarks.studies.clean_base.handicap fuzzy --texts "moon" "golden moon" "morning moon"

The weights of organism and clean base are mixed, base + strength x (organism - base), and at each strength the negative
log-likelihood of the whole behaviour is measured behind the planted trigger and behind other texts, such as those that
an attack found in its place, mean over prompts with the slot at random places. With --random, the same texts are also
measured with random words before them, which shows what a longer text saves whatever it holds.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
import tyro

from attacks.clean_base import at_strength
from attacks.objectives.target_nll import TargetNLL
from attacks.scoring.engine import Engine
from attacks.searchers.words import dictionary
from benchmarks.bad_input import exit_on_bad_input
from benchmarks.studies.clean_base.planted import with_base

COMMON = 4096
"""Words that random ones are drawn from, the commonest"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Measures texts beside the planted trigger of an organism, at several strengths of its backdoor."""

    organism: tyro.conf.Positional[str]
    """Organism with a fixed behaviour; python -m benchmarks.organisms list prints all."""
    texts: tuple[str, ...] = ()
    """Texts beside the planted trigger; its fragments and near misses, from the card, where none is given."""
    models: Path | None = None
    """Folder of planted models, where the organism is not a shipped one."""
    strengths: tuple[float, ...] = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
    """Strengths of the difference between organism and base; 1 is the organism."""
    prompts: int = 8
    """Prompts that the likelihood is averaged over."""
    random: int = 0
    """Random words of the dictionary that are put before each text, one by one; 0: none."""
    threads: int = 2
    """CPU threads."""


def measured(settings: Settings) -> pd.DataFrame:
    """Nats of the whole behaviour behind each text, `strengths texts`; the share of prompts that fire in brackets.

    Of a text with random words before it the mean over these words, and the least in brackets.

    Raises:
        ValueError: as for `with_base`.
    """
    organism, suspect = with_base(settings.organism, settings.models)
    base = suspect.base
    assert base is not None
    trigger, behaviour = organism.triggers[0]
    card = organism.card["backdoors"][0]
    texts = [trigger, *(settings.texts or (*card.get("fragments", {}), *card.get("near_misses", {})))]
    search = organism.prompts.search[: settings.prompts]
    target = suspect.target_ids(behaviour, search)
    like = suspect.engine(search, 1)
    problem = (suspect.engine_of_random_places(search, like) or like).problem
    common = random.Random(0).sample(dictionary()[:COMMON], settings.random)
    rows = []
    for strength in settings.strengths:
        engine = Engine(at_strength(suspect.model, base, strength), problem)
        row: dict[str, str] = {}
        for text in dict.fromkeys(texts):
            ids = torch.tensor([problem.encode(text)])
            row[text] = f"{_nats(engine, target, text):.2f} ({float(engine.elicits(ids, target)[0]):.2f})"
            if longer := [_nats(engine, target, f"{word} {text}") for word in common]:
                row[f"random word + {text}"] = f"{sum(longer) / len(longer):.2f} ({min(longer):.2f})"
        rows.append(row)
    return pd.DataFrame(rows, index=pd.Index(settings.strengths, name="strength"))


def _nats(engine: Engine, target: Sequence[int], text: str) -> float:
    """Nats of the behaviour behind a text, mean over prompts."""
    ids = torch.tensor([engine.problem.encode(text)])
    return len(target) * float(engine.losses(TargetNLL(target_ids=tuple(target)), ids)[0])


def main(settings: Settings) -> None:
    """Prints the table."""
    torch.set_num_threads(settings.threads)
    with exit_on_bad_input():
        print(measured(settings).to_markdown())


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
