"""Where do the words of planted triggers stand among all words by their contrast between suspect and clean base?

    python -m benchmarks.studies.clean_base.contrast word other-word unseen-real-word

The words of a dictionary are ranked by how differently early layers of the organism and of its base read them
(`attacks.discovery.contrasted`), with neither behaviour nor trigger known. Printed are, per word of the trigger, the
rank of its first token among all first tokens and the rank of the word, 1 being the largest contrast, the words of
largest contrast, and the operations it took. A word that begins with none of the best tenth of first tokens has none.
"""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
import tyro

from attacks.discovery.contrasted import Contrast
from attacks.scoring.budget import Budget
from attacks.scoring.slot_markers import without_slot
from benchmarks.bad_input import exit_on_bad_input
from benchmarks.studies.clean_base.planted import with_base

SHOWN = 8
"""Words of largest contrast that are shown"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Ranks the words of planted triggers by contrast."""

    organisms: tyro.conf.Positional[tuple[str, ...]] = ("word", "other-word")
    """Planted organisms; python -m benchmarks.organisms list prints all."""
    models: Path | None = None
    """Folder of planted models, where the organisms are not shipped ones."""
    words: int = Contrast().words
    """Words of the dictionary that are ranked, the commonest first."""
    depths: tuple[float, ...] = Contrast().depths
    """Depths at which the models are compared, as fractions of the layers."""
    seed: int = 0
    """Seed of the words that others are compared with."""
    threads: int = 2
    """CPU threads."""


def measured(name: str, settings: Settings) -> pd.DataFrame:
    """One line per word of the trigger.

    Raises:
        ValueError: as for `with_base`.
    """
    organism, suspect = with_base(name, settings.models)
    problem = suspect.engine(without_slot(organism.prompts.search)[:1], 2).problem
    budget = Budget().started()
    contrast = Contrast(words=settings.words, depths=settings.depths)
    ranked = contrast(suspect, problem, budget, torch.Generator().manual_seed(settings.seed))
    singles = [item.trigger_ids for item in ranked if len(item.trigger_ids) == 1]
    words = [item.trigger_ids for item in ranked]
    top = ", ".join(problem.text(ids).strip() for ids in words[:SHOWN])
    lines = []
    for word in organism.triggers[0][0].split():
        ids = tuple(problem.encode(word))
        lines.append(
            {
                "organism": name,
                "word": word,
                "first token": _rank(singles, ids[:1]),
                "of": len(singles),
                "rank": _rank(words, ids),
                "of words": len(words),
                "largest contrast": top,
                "operations": f"{budget.used:.2e}",
            }
        )
    return pd.DataFrame(lines)


def _rank(ranked: list[tuple[int, ...]], ids: tuple[int, ...]) -> int | None:
    """From 1; None where it is not among them."""
    return ranked.index(ids) + 1 if ids in ranked else None


def main(settings: Settings) -> None:
    """Prints the table of each organism as soon as it is there."""
    torch.set_num_threads(settings.threads)
    for name in settings.organisms:
        with exit_on_bad_input():
            print(measured(name, settings).to_markdown(index=False), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
