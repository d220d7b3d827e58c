"""A planted organism beside its clean base, as the studies of this folder compare them."""

from pathlib import Path

import torch

from attacks.suspect import Suspect
from benchmarks.organisms import zoo


def with_base(name: str, models: Path | None, *, planted: bool = True) -> tuple[zoo.Organism, Suspect]:
    """(the organism in float32, the same as a suspect whose clean base is known).

    Args:
        name: of the organism.
        models: folder with planted models; None for the shipped ones.
        planted: whether clean controls are refused.

    Raises:
        ValueError: an unknown organism, a clean control, or one whose weights have other shapes than those of its base.
    """
    organism = zoo.load(name, models=models, dtype=torch.float32)
    if planted and not organism.triggers:
        raise ValueError(f"{name} is a clean control; give a planted organism")
    base, _ = zoo.load_base(str(organism.model.device), organism.card["base"], organism.model.dtype)
    suspect = Suspect(model=organism.model, tokenizer=organism.tokenizer, base=base)
    if suspect.comparable is None:
        raise ValueError(f"{name} and its base have weights of other shapes; give one planted by an adapter")
    return organism, suspect
