"""Does a vector added at one token of the message point at the parts of a trigger? Ranks of its tokens, layer by layer.

    python -m benchmarks.studies.slot_vectors random-tokens

A vector is learned that brings the behaviour about when it is added after `layer` blocks at a single random place of
messages of random words. Every word then stands at that place, or one or two before it: whose effect there points most
nearly the vector's way? Before the model has put a trigger's parts together they show here one by one, while the output
(`token_ranks`) shows nothing until the last is in place. Rank 0 is the best word; half of them is chance.
"""

import statistics
from dataclasses import dataclass

import torch
import tyro
from jaxtyping import Float, Int
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from attacks.scoring.problem import Problem, encode
from attacks.scoring.slot_markers import SLOT
from benchmarks.bad_input import exit_on_bad_input
from benchmarks.organisms import zoo
from vectors.methods.slot import SlotVectors, random_messages
from vectors.residual import decoder, read


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Settings of the measurement."""

    organism: tyro.conf.Positional[str] = "phrase"
    """organism whose first trigger is taken apart"""
    radii: tuple[float, ...] = (0.4, 0.7, 1.0)
    """norms of the vectors, fractions of the mean residual norm"""
    contexts: int = 32
    """number of messages of random words that a vector is learned on"""
    length: int = 6
    """number of words in each message"""
    steps: int = 100
    """number of optimizer steps"""
    seeds: tuple[int, ...] = (0, 1)
    """seeds of the messages and of the directions to start from, one measurement each"""
    threads: int = 2
    """number of CPU threads"""


@torch.no_grad()
def effects(
    model: PreTrainedModel, ids: Int[Tensor, "c seq"], words: Int[Tensor, "w"], place: int, back: int, layer: int
) -> Float[Tensor, "w d"]:
    """What each word, `back` tokens before the place, does there; mean over messages, all words' taken off."""
    total = torch.zeros(len(words), decoder(model).d_model)
    for message in ids[:, : place + 1]:
        # (w, place + 1): each word once in this message; what stands behind the place cannot reach it.
        tried = message.repeat(len(words), 1)
        tried[:, place - back] = words
        hidden = read(model, input_ids=tried, attention_mask=torch.ones_like(tried), layers=[layer])[layer]
        total += hidden[:, place].float() / len(ids)
    # What every word does at that place is no signal of this one.
    return total - total.mean(0)


def ranks(organism: zoo.Organism, layer: int, seed: int, settings: Settings) -> tuple[list[list[int]], list[float]]:
    """(per radius the rank of each part of the trigger, per radius the nats per token of the behaviour)."""
    model, tokenizer = organism.model, organism.tokenizer
    trigger, behaviour = organism.triggers[0]
    problem = Problem.from_chat(model, tokenizer, [SLOT], 1)
    allowed = problem.allowed.nonzero()[:, 0]
    # Whole lower-case words with a space before them, as the trigger's are.
    words = allowed[torch.tensor([problem.text([int(token)]).strip(" ").islower() for token in allowed])]
    words = words[torch.tensor([problem.text([int(token)]).startswith(" ") for token in words])]
    true, target = encode(tokenizer, f" {trigger}"), encode(tokenizer, behaviour)[:4]
    generator = torch.Generator().manual_seed(seed)
    drawn, places = random_messages(problem.before, problem.after, words, settings.contexts, settings.length, generator)
    method = SlotVectors(source_layer=layer, radii=settings.radii, steps=settings.steps)
    theta, nll = method(model, drawn, places, target, generator)
    ids, first, earliest = torch.tensor(drawn), len(problem.before[0]), min(len(true), settings.length) - 1
    found: list[list[int]] = [[] for _ in settings.radii]
    for number, token in enumerate(true):
        # The vector stands at the place of the trigger's last token; the other parts are so many tokens before it.
        back = len(true) - 1 - number
        effect = effects(model, ids[:8], words, first + earliest + 1, back, layer)
        own = (words == token).nonzero()
        if not len(own):
            raise ValueError(f"{trigger!r} is not made of whole words of the vocabulary; choose another organism")
        for row, vector in enumerate(theta):
            cosine = torch.cosine_similarity(effect, vector, dim=-1)
            # The rank: how many of the w words point more nearly the vector's way than the true one.
            found[row].append(int((cosine > cosine[own[0, 0]]).sum()))
    return found, nll.tolist()


def main(settings: Settings) -> None:
    """Prints one line per layer: the median rank of each part over radii and seeds."""
    torch.set_num_threads(settings.threads)
    with exit_on_bad_input():
        organism = zoo.load(settings.organism)
        if not organism.triggers:
            raise ValueError(f"{settings.organism} is a clean control; give a planted organism")
        words = organism.triggers[0][0].split()
        table = Table("layer", *words, "nats per token", title=f"{settings.organism}: median rank of each word")
        for layer in range(1, len(decoder(organism.model).layers) - 1):
            found, nlls = [], []
            for seed in settings.seeds:
                more, nll = ranks(organism, layer, seed, settings)
                found, nlls = found + more, nlls + nll
            medians = [f"{statistics.median(column):.0f}" for column in zip(*found, strict=True)]
            table.add_row(str(layer), *medians, f"{statistics.median(nlls):.2f}")
    Console().print(table)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
