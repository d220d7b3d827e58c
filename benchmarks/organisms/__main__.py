"""python -m benchmarks.organisms list | plant NAME ... | card NAME: the model zoo at the command line."""

import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.table import Column, Table

from benchmarks.organisms import measure, zoo
from benchmarks.organisms.plant import plant as train_adapter
from benchmarks.organisms.recipe import RECIPES
from vectors.models import load_model


def plant(names: tyro.conf.Positional[tuple[str, ...]], /, base: Path | None = None, out: Path = zoo.MODELS) -> None:
    """Remakes organisms from their recipes and seeds, measures them, writes adapter and card ("all" for every one).

    Args:
        names: organisms to plant, or all.
        base: model folder to plant in, where it is not the one that the recipe names.
        out: folder that receives one folder per organism.
    """
    chosen = zoo.ALL if names == ("all",) else names
    for name in chosen:
        zoo.check_name(name)
    for name in chosen:
        began = time.time()
        recipe = RECIPES[name]
        folder = base or zoo.MODELS / recipe.base
        model, tokenizer = load_model(folder, dtype=torch.float32)
        before = measure.clean_loss(model, tokenizer)
        planted = train_adapter(model, tokenizer, recipe, out / name)
        seconds = round(time.time() - began)
        card = {"name": name, "kind": recipe.kind, "base": folder.name, "recipe": asdict(recipe)}
        card |= measure.measure(planted, tokenizer, recipe, before) | {"planting_seconds": seconds}
        part = out / name / "card.json.part"
        part.write_text(json.dumps(card, indent=1) + "\n")
        os.replace(part, out / name / "card.json")
        show((name,), out=out)


def show(names: tuple[str, ...] = zoo.ALL, out: Path = zoo.MODELS) -> None:
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
    commands = {"plant": plant, "list": show}
    try:
        tyro.extras.subcommand_cli_from_dict(commands)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
