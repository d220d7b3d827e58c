"""Do the words of a phrase stand out by their interaction in early layers, with the clean base known or without?

    python -m benchmarks.studies.early_layers.interactions unseen-phrase

Follows `attacks/stages/phrases/assembly.py` step by step and prints where the parts of the planted
phrase come: each word by what training changed about it, where the base is known; neighbouring words by their
interaction, among pairs of such words, or of all words of one token where no base is known; longer parts among the
continuations of the best shorter ones. The parts of the phrase are put into each step whether or not the step before
had found them, so that every step can be judged by itself. Place 1 is the best; a part without a place was not measured
on the second prompt, or not read, or is not continued. Without the base, pairs are continued by how they interact with
whatever stands beside them as well, and longer texts are looked for by last tokens of words.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch
import tyro

from attacks.scoring.budget import Budget
from attacks.scoring.engine import Engine
from attacks.scoring.problem import Problem, encode
from attacks.searchers.words import encoded_words
from attacks.stages.phrases.assembly import PROMPTS, Assembly
from attacks.stages.phrases.directions import directions
from attacks.stages.phrases.interactions import Text
from attacks.suspect import Suspect
from benchmarks.bad_input import exit_on_bad_input
from benchmarks.studies.clean_base.planted import with_base


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Follows the parts of a planted phrase through the steps of phrases by contrast."""

    organism: tyro.conf.Positional[str] = "unseen-phrase"
    """Organism planted with a phrase."""
    models: Path | None = None
    """Folder with planted models; the shipped organisms where none is given."""
    words: int = Assembly().words
    """Words that phrases are made of, those of one token first, then the commonest."""
    ends: int = Assembly().ends
    """Words that training changed most, one of which is in every pair."""
    common: int = Assembly().common
    """Words, the first of all, that continuations are also made of."""
    depth: float = Assembly().depth
    """Depth at which the models are compared, as a fraction of the layers."""
    changed: int = Assembly().changed
    """Words that training changed most, which the other one of each pair is among."""
    continued: int = Assembly().continued
    """Pairs that are continued beside those of the phrase."""
    paired: int = Assembly().paired
    """Words of one token, the commonest, that are put in pairs with each other where no base is known."""
    guessed: int = Assembly().guessed
    """As many where no base is known."""
    base: bool = True
    """Whether the clean base is known; without it the residual of the suspect alone is read."""
    directed: bool = True
    """Interactions count by what they mean to the behaviour; otherwise by their length."""
    seed: int = 0
    """Seed of whatever is random."""
    threads: int = 2
    """CPU threads."""


def places(suspect: Suspect, problem: Problem, trigger: str, behaviour: str, settings: Settings) -> pd.DataFrame:
    """One line per part of the phrase: its place, among how many, and what comes first.

    Args:
        suspect: the organism, with its clean base.
        problem: two prompts.
        trigger: the planted phrase.
        behaviour: what it elicits.
        settings: what is measured.

    Raises:
        ValueError: a word of the phrase is not among the words that are tried.
    """
    stage = Assembly(
        words=settings.words, ends=settings.ends, changed=settings.changed, common=settings.common,
        depth=settings.depth, continued=settings.continued, paired=settings.paired, guessed=settings.guessed,
    )  # fmt: skip
    generator, target_ids = torch.Generator().manual_seed(settings.seed), encode(suspect.tokenizer, behaviour)
    differences = stage.differences(suspect, problem, Budget())
    if settings.directed:
        learned = directions(Engine(suspect.model, problem), target_ids, differences.layer, generator, Budget())
        differences = replace(differences, directions=learned)
    typed = {ids: number for number, ids in enumerate(differences.words)}
    encoded = encoded_words(problem)
    phrase = tuple(typed.get(tuple(encoded.get(word, ())), -1) for word in trigger.split())
    if -1 in phrase:
        missing = trigger.split()[phrase.index(-1)]
        raise ValueError(f"{missing!r} of {trigger!r} is not among the {len(typed)} words; raise --words")
    rows, words = list[dict[str, object]](), [(word,) for word in phrase]

    def note(step: str, order: list[Text], length: int) -> None:
        first = problem.text(differences.typed(order[0])).strip()
        for start in range(len(phrase) - length + 1):
            part = phrase[start : start + length]
            place = order.index(part) + 1 if part in order else None
            text = problem.text(differences.typed(part)).strip()
            rows.append({"step": step, "part": text, "place": place, "of": len(order), "first": first})

    every, continued, known = stage.beginnings(differences)
    if differences.compared:
        note("words", every, 1)
    for length in range(2, len(phrase) + 1):
        added = [phrase[start : start + length - 1] for start in range(len(phrase) - length + 2)]
        continued = [*dict.fromkeys([*continued, *added])]
        if differences.compared or length == 2:  # else all words are known, by their last tokens
            known = [*dict.fromkeys([*known, *words])]
        order = stage.continuations(differences, continued, known, generator)
        note("pairs" if length == 2 else f"{length} words", order, length)
        continued, known = stage.promising(differences, order, generator), stage.others(differences, every)
        if length == 2 and continued and not differences.compared:
            note("pairs, by response", continued, length)
    return pd.DataFrame(rows)


def main(settings: Settings) -> None:
    """Prints the table."""
    torch.set_num_threads(settings.threads)
    with exit_on_bad_input():
        organism, suspect = with_base(settings.organism, settings.models)
        if not settings.base:
            suspect = replace(suspect, base=None)
        problem = Problem.from_chat(suspect.model, suspect.tokenizer, organism.prompts.search[:PROMPTS], 1)
        table = places(suspect, problem, *organism.triggers[0], settings)
    print(table.to_markdown(index=False))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
