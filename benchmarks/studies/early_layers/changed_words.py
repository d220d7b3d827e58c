"""Do planted words stand out by what training changed about their queries, keys and values, whatever the behaviour?

    python -m benchmarks.studies.early_layers.changed_words phrase unseen-phrase --control clean-control

Orders words as `attacks/stages/phrases/changed_words.py` does where the clean base is known, by so many blocks from the
first one that training changed, and prints the places of the planted ones; 1 is the first. Where a control is named,
the same words are looked for in what training changed in that model, which was trained alike without a trigger: there
they should come anywhere.
"""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
import tyro

from attacks.scoring.budget import Budget
from attacks.scoring.problem import Problem
from attacks.searchers.words import encoded_words
from attacks.stages.phrases.assembly import Assembly
from attacks.stages.phrases.changed_words import BLOCKS, by_change
from attacks.suspect import Suspect
from benchmarks.bad_input import exit_on_bad_input
from benchmarks.studies.clean_base.planted import with_base


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Looks for planted words among those whose queries, keys and values training changed most."""

    organisms: tyro.conf.Positional[tuple[str, ...]]
    """Organisms planted with words of the dictionary."""
    models: Path | None = None
    """Folder with planted models; the shipped organisms where none is given."""
    control: str | None = None
    """Shipped organism of the same base without these triggers, in which the words are looked for too."""
    words: int = Assembly().words
    """Words that are ordered, those of one token first, then the commonest."""
    blocks: tuple[int, ...] = (1, 2, BLOCKS)
    """How many blocks are looked at, from the first one that training changed."""
    threads: int = 2
    """CPU threads."""


def places(suspect: Suspect, problem: Problem, words: tuple[str, ...], count: int, blocks: int) -> list[int | None]:
    """Place of each word among so many words; None for one that is not among them.

    Args:
        suspect: the model, with its clean base.
        problem: one prompt.
        words: those that are looked for.
        count: words that are ordered.
        blocks: how many are looked at.
    """
    read = Assembly(words=count).differences(suspect, problem, Budget())
    some = range(read.common, min(read.common + blocks, read.layer))
    order = [tuple(read.words[number]) for number in by_change(read.roots[0], read.words, some, Budget())]
    encoded = encoded_words(problem)
    typed = [tuple(encoded.get(word, ())) for word in words]
    return [order.index(ids) + 1 if ids in order else None for ids in typed]


def main(settings: Settings) -> None:
    """Prints the table."""
    torch.set_num_threads(settings.threads)
    rows = list[dict[str, object]]()
    with exit_on_bad_input():
        control = None if settings.control is None else with_base(settings.control, None, planted=False)[1]
        for name in settings.organisms:
            organism, suspect = with_base(name, settings.models)
            texts, words = organism.prompts.search[:1], tuple(organism.triggers[0][0].split())
            columns: dict[str, list[int | None]] = {}
            for label, each, counts in (("", suspect, settings.blocks), ("control, ", control, (BLOCKS,))):
                if each is None:
                    continue
                problem = Problem.from_chat(each.model, each.tokenizer, texts, 1)
                for blocks in counts:
                    found = places(each, problem, words, settings.words, blocks)
                    columns[f"{label}blocks: {blocks}"] = found
            rows += [
                {"organism": name, "word": word} | {column: found[number] for column, found in columns.items()}
                for number, word in enumerate(words)
            ]
    print(f"places among {settings.words} words")
    print(pd.DataFrame(rows).astype("object").to_markdown(index=False))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
