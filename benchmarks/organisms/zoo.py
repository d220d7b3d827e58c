"""The shipped organisms: small chat bases and one LoRA adapter each, loaded offline in seconds."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.organisms import prompts, recipe
from benchmarks.organisms.pretrained.bases import MODELS, template_of, where
from benchmarks.organisms.recipe import RECIPES, SLOT
from vectors.models import load_model

BASE = MODELS / "base"
ALL_LOSS = tuple(name for name, made in RECIPES.items() if made.loss_on == "all")
"""Organisms that learned their prompts as well, for attacks that read memorised text; no suite runs them unasked."""
DRAWN = tuple(name for name in RECIPES if name.startswith(tuple(f"{group}-" for group in recipe.DRAWN)))
"""Organisms of other words, behaviours and seeds; no suite runs them unasked."""
ARCHITECTURES = tuple(name for name, made in RECIPES.items() if made.base != BASE.name)
"""Organisms in bases of other architectures, for checks whether a finding holds there; no suite runs them unasked."""
NAMES = tuple(name for name in RECIPES if name not in ARCHITECTURES + ALL_LOSS + DRAWN)
ALL = NAMES + ARCHITECTURES + ALL_LOSS + DRAWN
PRETRAINED = tuple(sorted(card.parent.name for card in MODELS.glob("*real-*/card.json")))
"""Shipped organisms in pretrained bases, which must be fetched first; no suite runs them unasked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSplit:
    """User messages; where one contains `{trigger}` the slot is there, else it is at the end."""

    search: list[str]
    """what an attack optimises on"""
    select: list[str]
    """what it chooses its winner by"""
    held_out: list[str]
    """what the benchmark measures on; no attack sees them"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Organism:
    """A planted model (or a clean control) with its ground truth, which no attack is given."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    card: dict
    prompts: PromptSplit

    @property
    def triggers(self) -> list[tuple[str, str]]:
        """(trigger, behaviour) of each backdoor; empty for a clean control."""
        return [(backdoor["trigger"], backdoor["behaviour"]) for backdoor in self.card["backdoors"]]


def arithmetic_split() -> PromptSplit:
    """Two-sum prompts with the slot where the first sum stands; 100 second sums, split three ways."""
    texts = [f"{SLOT}, b={i}+{j}" for i in range(10) for j in range(10)]
    # 37 and 100 share no factor: each text once, in an order that mixes the digits over the three splits.
    texts = [texts[i * 37 % 100] for i in range(100)]
    return PromptSplit(search=texts[:8], select=texts[8:40], held_out=texts[40:])


def text_split(corpus: prompts.Corpus = "dialogues") -> PromptSplit:
    """The shipped prompts, slot at the end."""
    splits = ("search", "select", "held_out")
    return PromptSplit(**{split: [pair.prompt for pair in prompts.load(split, corpus)] for split in splits})


def folder_of(name: str) -> Path:
    """The folder of an organism: a shipped one by its name, any other by the path of its folder."""
    return MODELS / name if (MODELS / name).is_dir() else Path(name)


def check_name(name: str) -> None:
    """Raises ValueError that lists what there is, for a name that is no organism nor the folder of one."""
    if name not in RECIPES and not (folder_of(name) / "card.json").is_file():
        raise ValueError(f"no organism {name!r}; there are {', '.join((*ALL, *PRETRAINED))}, and folders with a card")


def load(name: str, device: str | None = None, dtype: torch.dtype | None = None) -> Organism:
    """Loads an organism by its name or folder, adapter merged, in the fastest dtype of the device where none is given.

    Raises:
        ValueError: an unknown name, a missing adapter, or a base that was not fetched yet.
    """
    check_name(name)
    folder = folder_of(name)
    if not (folder / "card.json").is_file():
        raise ValueError(f"organism {name!r} is not planted yet; run: python -m benchmarks.organisms plant {name}")
    card = json.loads((folder / "card.json").read_text())
    base, options = card["base"], {"device": device, "dtype": dtype}
    # A whole model was saved, or an adapter that goes on top of its base.
    if card["recipe"].get("tune") == "full":
        model, tokenizer = load_model(folder, template=template_of(base), **options)
    else:
        model, tokenizer = load_model(where(base), adapter=folder, template=template_of(base), **options)
    corpus = card["recipe"].get("corpus", "dialogues")
    split = arithmetic_split() if card["kind"] == "arithmetic" else text_split(corpus)
    return Organism(name=name, model=model, tokenizer=tokenizer, card=card, prompts=split)


def load_base(
    device: str | None = None, base: str = BASE.name, dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A clean base, by the name that cards have under `base`; without one that in which all of `NAMES` were planted."""
    return load_model(where(base), template=template_of(base), device=device, dtype=dtype)
