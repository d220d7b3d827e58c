"""A planting that was cut off goes on from here with the same numbers: weights, optimizer and order of the data."""

import json
import os
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.organisms.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One file, replaced in one move, that says of which planting it is."""

    file: Path
    planting: str
    """digest of the base and recipe, as JSON"""

    @classmethod
    def of(cls, file: Path, recipe: Recipe, digest: str) -> "Checkpoint":
        """The checkpoint of a recipe planted in the base of that weights digest."""
        return cls(file, json.dumps([digest, asdict(recipe)]))

    def restore(self, trained: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, rng: random.Random) -> int:
        """Brings back what was saved and returns the number of steps done, 0 where there is nothing yet.

        Raises:
            ValueError: the file is that of another recipe or base.
        """
        if not self.file.is_file():
            return 0
        # Only tensors and plain values are read: a checkpoint that was tampered with cannot run code.
        state = torch.load(self.file, weights_only=True, map_location="cpu")
        # The whole recipe is compared: a step more or another seed would continue another training.
        if state["planting"] != self.planting:
            raise ValueError(f"{self.file} is of another recipe or base; delete it, or plant into another folder")
        with torch.no_grad():
            for name, weight in trained.items():
                weight.copy_(state["trained"][name])
        optimizer.load_state_dict(state["optimizer"])
        rng.setstate(state["rng"])
        # Dropout draws from the global generator, the batches from `rng`: both go on where they were.
        torch.set_rng_state(state["dropout"])
        if torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["dropout_cuda"])
        return state["step"]

    def save(
        self, step: int, trained: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, rng: random.Random
    ) -> None:
        """Saves the state after `step` steps."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        state = {"planting": self.planting, "step": step, "rng": rng.getstate(), "optimizer": optimizer.state_dict()}
        # Dropout draws from torch's global generators, so their states belong to the planting as well.
        state |= {"dropout": torch.get_rng_state()}
        if torch.cuda.is_available():
            state |= {"dropout_cuda": torch.cuda.get_rng_state_all()}
        part = self.file.with_suffix(".part")
        torch.save(state | {"trained": {name: weight.detach() for name, weight in trained.items()}}, part)
        os.replace(part, self.file)
