"""GGUF files as models: transformers passes over tensors and settings that it has no place for, without a word.

The head of a file is read here (specification: ggml, docs/gguf.md), because the reader of the package gguf makes arrays
of every token and takes half a minute for a vocabulary of 262,144.
"""

import math
import mmap
import re
import struct
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import transformers
from packaging.version import Version
from transformers import PreTrainedModel

from vectors.loading.folders import check_no_pointer
from vectors.residual import decoder, embedding

PART = re.compile(r"-\d{5}-of-(\d{5})\.gguf$", re.IGNORECASE)
"""End of the name of one of several files that hold a model together"""
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Formats of `struct` for the types of settings; 8 is a string and 9 an array"""
COMPUTED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Factors of positions, which differ from 1 for what stands thousands of tokens apart only"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What a GGUF file says of itself."""

    settings: dict[str, Any]
    """numbers and strings by name; None in the place of arrays"""
    values: dict[str, int]
    """how many values each tensor has"""


def located(name: str | Path) -> tuple[str | Path, str | None]:
    """Folder and file name of a GGUF file, given as path or as `folder:file.gguf`; any other name as it is.

    Raises:
        ValueError: no such file, or one that cannot be read whole.
    """
    if not str(name).lower().endswith(".gguf"):
        return name, None
    file = Path(name)
    if not file.is_file():
        folder, _, inner = str(name).rpartition(":")
        file = Path(folder) / inner if folder else file
    if not file.is_file():
        raise ValueError(f"no GGUF file {file}; give its path, or folder:file.gguf")
    check_no_pointer(file)
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise ValueError(f"{file} is no GGUF file (it does not begin with GGUF); get it again")
    if Version(transformers.__version__) < Version("5"):
        raise ValueError(f"{file} is a GGUF file, read with transformers 5 only; this is {transformers.__version__}")
    named = PART.search(file.name)
    parts = max(int(named.group(1)) if named else 1, read_head(file).settings.get("split.count") or 1)
    if parts > 1:
        raise ValueError(f"{file} is one of {parts} parts; join them with llama-gguf-split --merge, and give the whole")
    return str(file.parent), file.name


def check_all_used(model: PreTrainedModel, file: Path) -> None:
    """Raises ValueError where the file holds weights or scales positions in a way that the model does not.

    Values are counted: transformers reshapes, stacks and renames tensors, but keeps every value.
    """
    head = read_head(file)
    tied = decoder(model).head.weight is embedding(model)
    ours = sum(weight.numel() for weight in model.parameters())
    theirs = sum(count for name, count in head.values.items() if name not in COMPUTED)
    again = head.values.get("output.weight", 0) if tied else 0  # some files hold a tied embedding twice
    if ours not in (theirs, theirs - again):
        raise ValueError(
            f"{file} holds {theirs:,} values but {type(model).__name__} has a place for {ours:,}: transformers does "
            "not read all of it; give the folder that it was made from"
        )
    kind = head.settings.get(f"{head.settings.get('general.architecture')}.rope.scaling.type") or "none"
    read = getattr(model.config, "rope_parameters", None) or {}
    if kind != "none" and read.get("rope_type", "default") == "default":
        raise ValueError(
            f"{file} scales positions ({kind}), which transformers does not read from GGUF files; give the folder that "
            "it was made from"
        )


def read_head(file: Path) -> Head:
    """Reads the settings and the list of tensors; raises ValueError for a file that is not whole."""
    try:
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            head, needed = _Reader(content).head()
            if needed > len(content):
                raise EOFError(f"it has {len(content):,} bytes of {needed:,}")
            return head
    except (EOFError, KeyError, ValueError, struct.error, OverflowError) as error:
        raise ValueError(f"{file} is cut off or broken ({error}); get it again") from error


class _Reader:
    """Reads one thing after another."""

    def __init__(self, content: mmap.mmap):
        self.content, self.place = content, 4

    def number(self, form: str) -> Any:
        (value,) = struct.unpack_from("<" + form, self.content, self.place)
        self.place += struct.calcsize("<" + form)
        return value

    def text(self) -> str:
        length = self.number("Q")
        self.place += length
        return self.content[self.place - length : self.place].decode()

    def setting(self, kind: int) -> Any:
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind == 8:
            return self.text()
        if kind != 9:
            raise ValueError(f"a setting of the unknown type {kind}")
        inner, count = self.number("I"), self.number("Q")
        if inner in NUMBERS:
            self.place += count * struct.calcsize("<" + NUMBERS[inner])
        else:
            for _ in range(count):
                self.setting(inner)
        return None

    def head(self) -> tuple[Head, int]:
        """(what the file says, bytes that it must have)."""
        if (version := self.number("I")) not in (2, 3):
            raise ValueError(f"its version is {version}, not 2 or 3")
        tensors, count = self.number("Q"), self.number("Q")
        settings = {self.text(): self.setting(self.number("I")) for _ in range(count)}
        sizes, values, end = import_module("gguf").GGML_QUANT_SIZES, {}, 0
        for _ in range(tensors):
            name, shape = self.text(), [self.number("Q") for _ in range(self.number("I"))]
            block, size = sizes[self.number("I")]  # the keys are numbers that have names
            values[name] = math.prod(shape)
            end = max(end, self.number("Q") + values[name] // block * size)
        step = settings.get("general.alignment") or 32
        return Head(settings=settings, values=values), -(-self.place // step) * step + end
