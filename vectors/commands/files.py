"""What commands read and write: models and JSON files. A file that exists is replaced only if the user asks for it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vectors.command_line import no_file
from vectors.loading.placement import Placement
from vectors.models import load_model

SUFFIX = ".safetensors"


Model = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """How the model is loaded, and where it runs."""

    adapter: str | None = None
    """folder of a peft adapter (such as a LoRA) to merge into the model"""
    threads: int | None = None
    """number of CPU threads; torch's own default where not given"""
    template: str | None = None
    """file of a chat template in jinja, or none to use prompts as plain text; the tokenizer's where not given"""
    allow_pickle: bool = False
    """read weights from pickled files (pytorch_model.bin) too, which can run code: only for models that you trust"""
    placement: Annotated[Placement, tyro.conf.arg(name="")] = Placement()

    def __call__(self, model: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Loads (model, tokenizer).

        Raises:
            ValueError: no such model, adapter or device.
        """
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads is {self.threads}; give at least 1")
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        return load_model(
            model,
            adapter=self.adapter,
            template=self.template,
            allow_pickle=self.allow_pickle,
            **self.placement.loading,
        )


def check_free(paths: Sequence[Path], overwrite: bool) -> None:
    """Raises ValueError for a path that is a folder or within a file, or what may not be replaced."""
    for path in paths:
        above = next(folder for folder in path.absolute().parents if folder.exists())
        if not above.is_dir():
            raise ValueError(f"--out {path} is not possible: {above} is a file; give another folder")
        if fault := no_file(path):
            raise ValueError(f"--out {path} is {fault}; give a file name")
        if path.exists() and not overwrite:
            raise ValueError(f"{path} exists; give another --out, or --overwrite to replace it")


def write_json(path: Path, content: dict[str, Any]) -> Path:
    """Writes a JSON file under another name first, so that an existing one is replaced only by a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)
    return path


def beside(path: Path, ending: str) -> Path:
    """Path of a figure that belongs to a file, without its suffix: the file's own name with an ending."""
    return path.with_name(path.name.removesuffix(SUFFIX).removesuffix(".json").removesuffix(".gguf") + ending)
