"""Finds the clean model that an organism is planted in, by the name that recipes and cards have for it."""

from pathlib import Path

from benchmarks.organisms.pretrained.fetch import PACKAGED, path_of

MODELS = Path(__file__).parents[1] / "models"


def where(base: str) -> str:
    """A name for `load_model`: a shipped base, a fetched packaged one, or a folder, GGUF file or hub id as it is.

    Raises:
        ValueError: a packaged base that was not fetched yet.
    """
    if (MODELS / base / "config.json").is_file():
        return str(MODELS / base)
    if base not in PACKAGED:
        return base
    file = path_of(base)
    if not file.is_file():
        raise ValueError(f"the base {base!r} is not here yet; run: python -m benchmarks.organisms fetch {base}")
    return str(file)


def template_of(base: str) -> str | None:
    """The chat template to load a base with: "none" for packaged bases without one, else its own (None)."""
    return PACKAGED[base].template if base in PACKAGED else None
