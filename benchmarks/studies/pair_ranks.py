"""What early layers show of a hard-planted phrase: the ranks of its first word, its last, and the pair of the two.

    python -m benchmarks.studies.pair_ranks phrase

Checks, layer by layer, what the attack stage `conjunctions` relies on. Three words stand in a message, and the
residual at the last of them is compared by its cosine with a vector that brings the behaviour about there, or, as a
control, with a random vector. Ranked are every word as the first and as the last among random words, by its mean
effect on the cosine, and every pair of a first and a last word, with a random word between, by its interaction. Rank
0 is the best; half of all words or pairs is chance.
"""

from dataclasses import dataclass, replace

import torch
import tyro
from rich.console import Console
from rich.table import Table

from attacks.scoring.budget import Budget
from attacks.scoring.problem import SLOT, Problem, encode
from attacks.searchers.words import whole_words
from attacks.stages.conjunctions import Conjunctions, interaction
from attacks.stages.early_layers import Inside
from benchmarks.bad_input import exit_on_bad_input
from benchmarks.organisms import zoo
from vectors.methods.controls import random_directions


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Settings of the measurement."""

    organism: tyro.conf.Positional[str] = "phrase"
    """organism planted with a phrase of three words of one token each"""
    layers: tuple[int, ...] = (1, 2, 3, 4)
    """numbers of blocks after which cosines are taken"""
    words: int = 600
    """number of words drawn from the vocabulary; those of the trigger are added"""
    tables: int = 2
    """number of tables of all pairs, each with other random words between; their sum is ranked"""
    seed: int = 0
    """seed of all random draws"""
    threads: int = 2
    """number of CPU threads"""


Ranks = tuple[int, int, int]
"""Ranks of the first word, of the last word, and of their pair; 0 is the best"""


def measured(organism: zoo.Organism, settings: Settings) -> tuple[dict[int, tuple[Ranks, Ranks]], int]:
    """(per layer the ranks by the learned and by a random vector, number of words).

    Raises:
        ValueError: an organism whose trigger is not three words of one token each.
    """
    model, tokenizer = organism.model, organism.tokenizer
    problem = Problem.from_chat(model, tokenizer, [SLOT], 3)
    known = whole_words(problem)
    trigger, behaviour = organism.triggers[0] if organism.triggers else ("", "")
    ids = encode(tokenizer, f" {trigger}")
    if len(ids) != 3 or not all(token in known.tolist() for token in ids):
        raise ValueError(f"the trigger {trigger!r} is not three words of one token; try phrase or random-tokens")
    generator = torch.Generator().manual_seed(settings.seed)
    drawn = known[torch.randperm(len(known), generator=generator)[: settings.words]].tolist()
    # The trigger's words lead the list, whether they were drawn or not: their indices are 0, 1 and 2.
    words = torch.tensor(list(dict.fromkeys([*ids, *drawn])))
    inside = Inside(model=model, problem=problem, words=words, budget=Budget())
    method, layers = Conjunctions(), list(settings.layers)
    for layer in layers:
        inside.learn(layer, tuple(encode(tokenizer, behaviour)), method.messages, method.length, generator)
    learned = inside.vectors
    # The control: a random direction at each layer in place of the learned one, all else equal.
    noise = {layer: random_directions(1, len(vector), generator)[0].to(vector) for layer, vector in learned.items()}
    by_learned, by_noise = (_ranks(replace(inside, vectors=vectors), settings) for vectors in (learned, noise))
    return {layer: (by_learned[layer], by_noise[layer]) for layer in layers}, len(words)


def _ranks(inside: Inside, settings: Settings) -> dict[int, Ranks]:
    """Ranks of the trigger's first and last word and of their pair at each layer; its words lead the list of words."""
    generator, every = torch.Generator().manual_seed(settings.seed + 1), list(range(len(inside.words)))
    method, ranks = Conjunctions(), {}
    effects = inside.effects(list(inside.vectors), method.leads, method.draws, generator)
    for layer, (firsts, _, lasts) in effects.items():
        pairs = torch.zeros(len(every), len(every))
        for _ in range(settings.tables):
            table = inside.table(layer, every, every, generator)
            assert table is not None  # no limit
            found = interaction(table)
            # Each table divided by its own spread: one with a strong middle word would outweigh the others.
            pairs += found / found.std()
        ranks[layer] = tuple(int((x > x[at]).sum()) for x, at in ((firsts, 0), (lasts, 2), (pairs, (0, 2))))
    return ranks


def main(settings: Settings) -> None:
    """Prints one line per layer."""
    torch.set_num_threads(settings.threads)
    with exit_on_bad_input():
        organism = zoo.load(settings.organism)
        ranks, words = measured(organism, settings)
    first, _, last = organism.triggers[0][0].split()
    columns = [f"{name}, {by}" for by in ("learned", "random") for name in (first, last, "pair")]
    table = Table("layer", *columns, title=f"ranks among {words} words and {words**2} pairs, by vector")
    for layer, (learned, noise) in ranks.items():
        table.add_row(str(layer), *map(str, (*learned, *noise)))
    Console().print(table)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
