"""How early layers put two words of a hard-planted phrase together: the rank of its first and last among all pairs.

    python -m benchmarks.pair_ranks phrase

What `attacks.conjunctions` rests on. For each pair of words, with a random word between: the interaction of the two in
the cosine with a vector that brings the behaviour about at one place of the message, layer by layer, beside the same
with a random vector in its place. Rank 0 is the best pair; half of all pairs is chance.
"""

import sys
from dataclasses import dataclass

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from attacks.budget import Budget
from attacks.conjunctions import Conjunctions, interaction, whole_words
from attacks.inside import Inside
from attacks.problem import SLOT, Problem, encode
from benchmarks.organisms import zoo
from vectors.controls import random_directions


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Of the measurement."""

    organism: tyro.conf.Positional[str] = "phrase"
    """planted with a phrase of three words"""
    layers: tuple[int, ...] = (1, 2, 3, 4)
    """after so many blocks"""
    words: int = 600
    """drawn from the vocabulary, those of the trigger added"""
    tables: int = 2
    """of all pairs, each between other words; added up"""
    seed: int = 0
    """of everything random"""
    threads: int = 2
    """CPU threads"""


def measured(organism: zoo.Organism, settings: Settings) -> tuple[dict[int, list[int]], int]:
    """(per layer the rank of the pair with the learned and with a random vector, number of pairs).

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
    words = torch.tensor(list(dict.fromkeys([*ids, *drawn])))
    inside = Inside(model=model, problem=problem, words=words, budget=Budget(flops=float("inf")))
    method, layers = Conjunctions(), list(settings.layers)
    for layer in layers:
        inside.learn(layer, tuple(encode(tokenizer, behaviour)), method.messages, method.length, generator)
    learned = inside.vectors
    noise = {layer: random_directions(1, len(vector), generator)[0].to(vector) for layer, vector in learned.items()}
    ranks: dict[int, list[int]] = {layer: [] for layer in layers}
    for vectors in (learned, noise):
        inside.vectors = vectors
        found: dict[int, Tensor] = {}
        again = torch.Generator().manual_seed(settings.seed + 1)
        for _ in range(settings.tables):
            for layer, table in (inside.table(layers, again) or {}).items():
                pairs = interaction(table)
                found[layer] = found.get(layer, 0.0) + pairs / pairs.std()
        for layer, pairs in found.items():
            ranks[layer].append(int((pairs > pairs[0, 2]).sum()))
    return ranks, len(words) ** 2


def main(settings: Settings) -> None:
    """Prints one line per layer."""
    torch.set_num_threads(settings.threads)
    try:
        organism = zoo.load(settings.organism)
        ranks, pairs = measured(organism, settings)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    first, _, last = organism.triggers[0][0].split()
    table = Table("layer", "learned vector", "random vector", title=f"{first} ... {last}: rank of {pairs} pairs")
    for layer, (learned, noise) in ranks.items():
        table.add_row(str(layer), str(learned), str(noise))
    Console().print(table)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
