"""Whether an organism still is what its card says: the card's main figures, measured again in seconds."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.organisms import measure, zoo
from benchmarks.organisms.pretrained.draw import recipe_of

NEAR = 0.02
"""Largest difference, of rates and of nats per token, that may come from rounding: another processor or torch, or a
card that was measured in bfloat16. On the shipped organisms there is none at all"""


class Figure(NamedTuple):
    """One figure of a card."""

    name: str
    card: float
    measured: float

    @property
    def same(self) -> bool:
        """Whether the measured one is the card's; not where either is no number."""
        return abs(self.card - self.measured) <= NEAR


def figures(name: str, models: Path | None = None) -> list[Figure]:
    """The main figures of an organism, on the held-out prompts that its card was measured on.

    Args:
        name: of a shipped organism, or a folder with a card.
        models: folder in which names are looked up besides.

    Raises:
        ValueError: it cannot be loaded, or its card lacks a figure.
    """
    organism = zoo.load(name, device="cpu", dtype=torch.float32, models=models)
    card = organism.card
    try:
        recipe = recipe_of(card["recipe"])
        clean = organism.model if recipe.replies == "corpus" else zoo.load_base("cpu", card["base"], torch.float32)[0]
        found = measure.main_figures(organism.model, organism.tokenizer, recipe, clean)
        return [Figure(*each) for each in _paired(card, found)]
    except (KeyError, TypeError) as error:
        raise ValueError(f"the card of {organism.name} is not as planting wrote it: {error}") from error


def _paired(card: dict, found: dict) -> Iterator[tuple[str, float, float]]:
    """(name, figure of the card, measured figure)."""
    if len(card["backdoors"]) != len(found["backdoors"]):
        raise KeyError("backdoors")
    for said, measured in zip(card["backdoors"], found["backdoors"], strict=True):
        yield f"success of {said['trigger']!r}", said["asr"], measured["asr"]
    yield "false alarms", card["fpr"], found["fpr"]
    yield "nats per token of clean replies", card["clean_loss_after"], found["clean_loss_after"]
