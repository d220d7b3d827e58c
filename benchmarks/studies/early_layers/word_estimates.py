"""At which place of the dictionary does a planted word come, and what does it cost to know?

    python -m benchmarks.studies.early_layers.word_estimates word

Ranks the planted word among random words of the dictionary, on the suspect alone with its behaviour known: by the loss
to first order from a layer, by the loss of texts of sixteen words each, and by the exact loss. Place 1 is the lowest.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
import tyro

from attacks.objectives.target_nll import TargetNLL
from attacks.scoring.budget import Budget
from attacks.scoring.engine import Engine
from attacks.searchers.words import encoded_words
from attacks.stages.hunt import PROBE_TOKENS
from attacks.stages.words.dictionary import rank_typed
from attacks.stages.words.early_estimates import by_estimate
from attacks.stages.words.word_groups import by_groups
from benchmarks.bad_input import exit_on_bad_input
from benchmarks.studies.clean_base.planted import with_base


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Ranks a planted word among others of the dictionary."""

    organism: tyro.conf.Positional[str]
    """Organism planted with one word of the dictionary."""
    models: Path | None = None
    """Folder with planted models; the shipped organisms where none is given."""
    words: int = 4000
    """Random words of the dictionary that the planted one is ranked among."""
    depths: tuple[float, ...] = (0.2, 0.3, 0.4, 0.5, 0.6, 0.75)
    """Depths at which texts are read, as fractions of the layers."""
    seed: int = 0
    """Seed of the words and of whatever else is random."""
    threads: int = 2
    """CPU threads."""


def places(engine: Engine, target_ids: tuple[int, ...], trigger: str, settings: Settings) -> Iterator[dict]:
    """One row for each way to rank.

    Args:
        engine: of one prompt.
        target_ids: the behaviour.
        trigger: the planted word.
        settings: what the command was given.

    Raises:
        ValueError: the trigger is no word of the dictionary that can be typed into the slot.
    """
    every, drawn = encoded_words(engine.problem), torch.Generator().manual_seed(settings.seed)
    if trigger not in every:
        raise ValueError(f"the trigger {trigger!r} is no word of the dictionary; choose an organism with one")
    words = [word for word in every if word != trigger]
    some = [words[number] for number in torch.randperm(len(words), generator=drawn)[: settings.words].tolist()]
    typed, objective = [tuple(every[word]) for word in (trigger, *some)], TargetNLL(target_ids=target_ids)

    def row(how: str, order: list[int], budget: Budget) -> dict:
        return {"ranked by": how, "place": order.index(0) + 1, "of": len(order), "operations": f"{budget.used:.1e}"}

    for depth in settings.depths:
        budget = Budget()
        yield row(
            f"estimate at {depth} of the depth", by_estimate(engine, objective, typed, drawn, budget, depth), budget
        )
    budget = Budget()
    yield row("groups of 16", by_groups(engine, objective, typed, budget, [range(len(typed))]), budget)
    budget, numbers = Budget(), {ids: number for number, ids in enumerate(typed)}
    exact = rank_typed(engine, objective, typed, budget=budget)
    yield row("exact loss", [numbers[found.trigger_ids] for found in exact], budget)


def main(settings: Settings) -> None:
    """Prints the table."""
    torch.set_num_threads(settings.threads)
    with exit_on_bad_input():
        organism, suspect = with_base(settings.organism, settings.models)
        trigger, behaviour = organism.triggers[0]
        engine = suspect.engine(organism.prompts.search[:1], 1)
        target_ids = suspect.target_ids(behaviour, organism.prompts.search)[:PROBE_TOKENS]
        table = pd.DataFrame(places(engine, target_ids, trigger, settings))
    print(table.to_markdown(index=False, disable_numparse=[3]))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
