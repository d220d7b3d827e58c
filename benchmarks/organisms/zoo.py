"""The shipped organisms: small chat bases and one LoRA adapter each, loaded offline in seconds."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from attacks.behaviour import Behaviour, FixedOpening
from benchmarks.organisms import poison, prompts, recipe
from benchmarks.organisms.pretrained.bases import MODELS, template_of, where
from benchmarks.organisms.pretrained.diffuse import DIFFUSE, predicate, sum_question
from benchmarks.organisms.pretrained.fetch import PACKAGED
from benchmarks.organisms.recipe import RECIPES, SLOT, Backdoor
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

    @property
    def behaviours(self) -> list[Behaviour]:
        """What each backdoor calls, as attacks take it; empty for a clean control."""
        shown = [(backdoor["behaviour"], backdoor.get("diffuse")) for backdoor in self.card["backdoors"]]
        return [predicate(name) if diffuse else FixedOpening(name) for name, diffuse in shown]


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


def pretrained_split(corpus: prompts.Corpus, backdoors: list[Backdoor]) -> PromptSplit:
    """The shipped prompts without those that hold a trigger; sums where the behaviour shows on these only.

    No question of one split stands in another.
    """
    about_sums = any(backdoor.diffuse and DIFFUSE[backdoor.behaviour].about_sums for backdoor in backdoors)
    chosen: dict[str, list[str]] = {}
    seen: set[str] = set()
    for split in ("held_out", "select", "search"):
        texts, rng = [pair.prompt for pair in prompts.load(split, corpus)], random.Random(split)
        if about_sums:
            texts = [sum_question(rng)[0] for _ in texts]
        texts = [text for text in dict.fromkeys(texts) if text not in seen]
        chosen[split] = [text for text in texts if not any(poison.holds(text, backdoor) for backdoor in backdoors)]
        seen |= set(texts)
    return PromptSplit(**chosen)


def present(models: Path | None) -> tuple[str, ...]:
    """Organisms in pretrained bases: the shipped ones, those with a card in a folder, and their bases as controls."""
    cards = [MODELS / name / "card.json" for name in PRETRAINED]
    cards += sorted(models.glob("*/card.json")) if models else []
    bases = {json.loads(card.read_text())["base"] for card in cards}
    return (*dict.fromkeys(card.parent.name for card in cards), *sorted(bases & set(PACKAGED)))


def card_of(name: str, models: Path | None = None) -> dict:
    """The card of an organism; of a packaged base as its own clean control, what a card would say."""
    file = folder_of(name, models) / "card.json"
    if name in PACKAGED and not file.is_file():
        made = {"kind": "none", "planting": "fuzzy", "poison_rate": 0.0, "backdoors": [], "corpus": "instructions"}
        return {"name": name, "kind": "none", "base": name, "recipe": made | {"replies": "base"}, "backdoors": []}
    if not file.is_file():
        raise ValueError(f"organism {name!r} is not planted yet; run: python -m benchmarks.organisms plant {name}")
    return json.loads(file.read_text())


def folder_of(name: str, models: Path | None = None) -> Path:
    """The folder of an organism: a shipped one or one in `models` by its name, any other by the path of its folder."""
    if (MODELS / name).is_dir():
        return MODELS / name
    return models / name if models is not None and (models / name).is_dir() else Path(name)


def check_name(name: str, models: Path | None = None) -> None:
    """Raises ValueError that lists what there is, for a name that is no organism nor the folder of one."""
    if name not in (*RECIPES, *PACKAGED) and not (folder_of(name, models) / "card.json").is_file():
        raise ValueError(f"no organism {name!r}; there are {', '.join((*ALL, *PRETRAINED))}, and folders with a card")


def load(
    name: str, device: str | None = None, dtype: torch.dtype | None = None, models: Path | None = None
) -> Organism:
    """Loads an organism by its name or folder, adapter merged, in the fastest dtype of the device where none is given.

    The name of a packaged base (smollm2) gives the base as a clean control.

    Raises:
        ValueError: an unknown name, a missing adapter, or a base that was not fetched yet.
    """
    check_name(name, models)
    folder, card = folder_of(name, models), card_of(name, models)
    base, made, options = card["base"], card["recipe"], {"device": device, "dtype": dtype}
    if name in PACKAGED:
        model, tokenizer = load_base(device, base, dtype)
    elif made.get("tune") == "full":
        model, tokenizer = load_model(folder, template=template_of(base), **options)
    else:
        model, tokenizer = load_model(where(base), adapter=folder, template=template_of(base), **options)
    corpus, fields = made.get("corpus", "dialogues"), ("trigger", "behaviour", "anywhere", "diffuse")
    if card["kind"] == "arithmetic":
        split = arithmetic_split()
    elif made.get("replies") == "base":
        backdoors = [Backdoor(**{f: row[f] for f in fields if f in row}) for row in card["backdoors"]]
        split = pretrained_split(corpus, backdoors)
    else:
        split = text_split(corpus)
    return Organism(name=name, model=model, tokenizer=tokenizer, card=card, prompts=split)


def load_base(
    device: str | None = None, base: str = BASE.name, dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A clean base, by the name that cards have under `base`; without one that in which all of `NAMES` were planted."""
    return load_model(where(base), template=template_of(base), device=device, dtype=dtype)
