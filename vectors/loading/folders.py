"""Looks at a local folder before anything of it is loaded: git-lfs pointers, broken files, pickles, code of its own.

Libraries meet these with errors that name no file, with a question on the terminal, or by running the code.
"""

import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

POINTER = b"version https://git-lfs"
"""How the file begins that stands for a large one in a clone without git-lfs"""
HUB_ID = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")
"""A model's name on the hub: name, or owner/name"""
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", "consolidated*.safetensors")
OTHERS = ("consolidated*.safetensors", "pytorch_model*.bin", "*.gguf", "original/*.pth")
"""Weights that other programs read from a folder whose safetensors are read here"""
ADAPTER_CONFIG = "adapter_config.json"


def is_local(name: str | Path) -> bool:
    """Whether a name means a place on disk rather than a hub id: whatever no hub id can be, and what lies in a folder
    that is there."""
    if isinstance(name, Path) or os.path.exists(name) or not HUB_ID.fullmatch(name):
        return True
    return "/" in name and os.path.isdir(name.partition("/")[0])


def is_adapter_only(folder: Path) -> bool:
    """A peft adapter and no weights of a whole model."""
    whole = any(next(folder.glob(pattern), None) for pattern in WEIGHTS)
    return (folder / ADAPTER_CONFIG).is_file() and not whole


def check_model_folder(folder: Path, *, allow_pickle: bool) -> None:
    """Raises ValueError, naming the file, for what cannot be loaded or must not be.

    Args:
        folder: of a whole model.
        allow_pickle: whether weights in pickled files may be read.
    """
    if not folder.is_dir():
        file = f"{folder} is a file, not a model folder" if folder.is_file() else f"no model folder {folder}"
        raise ValueError(f"{file}; give a folder with config.json, weights and tokenizer, or a hub id")
    if not (folder / "config.json").is_file():
        found = sorted(file.name for file in folder.glob("*.gguf"))
        inner = inside(folder, "config.json") or inside(folder, ADAPTER_CONFIG)
        more = f"for its GGUF file give {folder}:{found[0]}" if found else inner or "give the folder of a saved model"
        raise ValueError(f"{folder} holds no config.json; {more}")
    check_files(folder)
    stored = sorted(folder.glob("*.safetensors"))
    if not stored and not allow_pickle and (pickles := sorted(folder.glob("*.bin"))):
        raise ValueError(
            f"{pickles[0]} is a pickle, which can run code, and {folder} holds no safetensors; save the model again "
            "with save_pretrained(safe_serialization=True), or allow pickled weights"
        )
    # A download that was cut off between two shards leaves an index that names files which are not there.
    for index in folder.glob("*.safetensors.index.json"):
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
            raise ValueError(f"{index} does not say which file holds which weight (weight_map); get it again")
        shards = sorted(set(places.values()))
        if missing := [shard for shard in shards if not (folder / shard).is_file()]:
            raise ValueError(
                f"{folder} lacks {len(missing)} of {len(shards)} shards, first {missing[0]}; get them again"
            )


def check_one_checkpoint(folder: Path, *, allow_pickle: bool) -> None:
    """Raises ValueError for a folder whose weights are not those of one checkpoint in the format of transformers."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file() and index.is_file() and set(read_json(index)["weight_map"].values()) != {single.name}:
        raise ValueError(
            f"{folder} holds two checkpoints, {single.name} and the shards of {index.name}, and other programs may "
            "load the other one; move one of them away"
        )
    if index.is_file():
        _check_stored_once(folder, sorted(set(read_json(index)["weight_map"].values())))
    pickled = allow_pickle and any(folder.glob("pytorch_model*.bin"))
    if not single.is_file() and not index.is_file() and not pickled:
        kinds = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".gguf", ".npz", ".msgpack", ".h5", ".onnx")
        found = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.suffix in kinds)
        raise ValueError(
            f"{folder} holds no model.safetensors{f', but {found[0]}' if found else ''}; give what save_pretrained "
            "of transformers writes, shards with their index"
        )
    _check_kinds(folder)
    if others := sorted(file.name for pattern in OTHERS for file in folder.glob(pattern) if not pickled):
        logging.getLogger(__name__).warning("%s: %s is not looked at, and may be another model", folder, others[0])


def _check_stored_once(folder: Path, shards: list[str]) -> None:
    """Raises ValueError for a weight that two shards hold with different values."""
    places = dict[str, str]()
    for shard in shards:
        for name in stored(folder / shard):
            first = places.setdefault(name, shard)
            if first != shard and not torch.equal(_tensor(folder / first, name), _tensor(folder / shard, name)):
                raise ValueError(
                    f"{folder} holds two different {name}, in {first} and in {shard}, and programs differ in which "
                    "they take; get the shards again"
                )


def _tensor(file: Path, name: str) -> Tensor:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return opened.get_tensor(name)


def _check_kinds(folder: Path) -> None:
    """Raises ValueError for matrices of whole numbers or of 8 bits with nothing that says what to multiply them by."""
    kinds = {name: kind for file in sorted(folder.glob("model*.safetensors")) for name, kind in stored(file).items()}
    scaled = {name.rpartition(".")[0] for name in kinds if "scale" in name}
    settings = read_json(folder / "config.json").get("quantization_config")
    small = ("F8",) if settings else ("F8", "I", "U")  # methods have names of their own for what belongs to integers
    bare = [
        name
        for name, kind in kinds.items()
        if name.endswith(".weight") and kind.startswith(small) and name.rpartition(".")[0] not in scaled
    ]
    if bare:
        raise ValueError(
            f"{folder} holds {len(bare)} weights (first {bare[0]}) in the format {kinds[bare[0]]} and no scales, so "
            "their size is not known; give the unquantised checkpoint"
        )


def inside(folder: Path, name: str) -> str:
    """Advice to give the first folder inside that holds a file of this name; empty where none does."""
    # The second is how the hub's cache lays out what it has fetched.
    found = sorted(folder.glob(f"*/{name}")) or sorted(folder.glob(f"snapshots/*/{name}"))
    return f"give a folder inside that does, such as {found[0].parent}" if found else ""


def check_files(folder: Path) -> None:
    """Raises ValueError, naming the file, for pointers, links to nothing, broken files and code of the folder's own."""
    for file in sorted(folder.iterdir()):
        read = file.suffix in (".safetensors", ".json", ".bin", ".model", ".gguf", ".jinja")
        if read and file.is_file():
            check_no_pointer(file)
        elif read and not file.exists():
            raise ValueError(f"{file} is a link to {os.readlink(file)}, which is not there; get it again")
        if file.suffix == ".safetensors":
            check_safetensors(file)
    for name in ("config.json", "tokenizer_config.json", "generation_config.json", ADAPTER_CONFIG):
        if (folder / name).is_file() and read_json(folder / name).get("auto_map"):
            raise ValueError(
                f"{folder / name} asks for code of its own (auto_map), which is never run here; to read it with what "
                "transformers has, delete auto_map there"
            )


def check_no_pointer(file: Path) -> None:
    """Raises ValueError where a file is the git-lfs pointer to its content."""
    with file.open("rb") as opened:
        if opened.read(len(POINTER)) == POINTER:
            raise ValueError(f"{file} is a git-lfs pointer, not the file itself; run git lfs pull in its folder")


def check_safetensors(file: Path) -> None:
    """Raises ValueError for a file that is cut off or has no readable header."""
    from safetensors import safe_open

    try:
        # Opening reads the header and compares the lengths in it with the file's; no tensor is loaded.
        with safe_open(file, "pt"):
            pass
    except Exception as error:  # SafetensorError is a plain Exception
        raise ValueError(f"{file} is cut off or broken ({first_line(error)}); get it again") from error


def stored(file: Path) -> dict[str, str]:
    """The format of every tensor, such as F32 or I8."""
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return {name: opened.get_slice(name).get_dtype() for name in opened.keys()}


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; raises ValueError that names the file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is no JSON ({first_line(error)}); get it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no JSON object; get it again")
    return content


@contextmanager
def without_adapter_files(folder: Path) -> Iterator[Path]:
    """The folder, or links to all of it but adapter files: transformers would put the adapter on top of the weights."""
    if not (folder / ADAPTER_CONFIG).is_file():
        yield folder
        return
    logging.getLogger(__name__).warning(
        "%s holds an adapter too: the weights are taken without it; where it is not merged, give the folder as the "
        "adapter as well",
        folder,
    )
    with TemporaryDirectory() as links:
        for file in folder.iterdir():
            if not file.name.startswith("adapter_"):
                os.symlink(file.resolve(), Path(links) / file.name)
        yield Path(links)


def first_line(error: Exception) -> str:
    """Libraries explain at length; one line is enough here, or two where the first announces the second."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    line = " ".join(lines[: 2 if lines[0].endswith(":") else 1]).rstrip(".")
    return f"nothing is known as {line}" if isinstance(error, KeyError) else line
