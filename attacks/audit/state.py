"""What a search knows after each of its steps, as one safetensors file that is always whole; no code in it is ever run.

The file holds a JSON text and tensors: the vectors of goals, and the state of the random generator. A digest over both
tells a broken file from a good one.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from attacks.judging.judge import TracePoint
from attacks.searchers.searcher import Found

Plain = dict[str, Any]
"""Numbers, texts and lists by name, as JSON holds them"""


@dataclass(slots=True, kw_only=True)
class State:
    """Where a search stands; a process that has it can go on."""

    request: Plain
    """What the search depends on, by name: options of the command, digests of model, tokenizer and prompts."""
    environment: Plain = field(default_factory=dict)
    """What the numbers depend on besides: device and versions; what differs in another process is said."""
    steps: list[Plain] = field(default_factory=list)
    """What every step that is done has changed, and what had been spent by then."""
    spent: tuple[float, float] = (0.0, 0.0)
    """Seconds and operations in all, those of a step that was broken off included."""
    measured: list[Plain] = field(default_factory=list)
    """What the judge of every goal has measured by the end of the last step (`Judge.measured`)."""
    trace: list[TracePoint] = field(default_factory=list)
    """Best trigger by time, by the end of the last step."""
    pending: list[Found] = field(default_factory=list)
    """Best triggers of the step that was broken off."""
    result: Plain | None = None
    """What a finished audit found; None: not finished."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Vectors of goals, and the state of the random generator, by name."""

    @classmethod
    def read(cls, path: Path) -> "State":
        """What `write` wrote; raises ValueError for any other file."""
        try:
            with safe_open(path, framework="pt") as file:
                text: str = file.metadata()["search"]
                tensors = {name: file.get_tensor(name) for name in file.keys()}
                if file.metadata()["digest"] != _digest(text, tensors):
                    raise ValueError("its content is not what was written")
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is broken: {error}") from error
        plain = json.loads(text)
        # JSON knows no tuples.
        plain["spent"] = tuple(plain["spent"])
        plain["pending"] = [Found(tuple(ids), loss) for ids, loss in plain["pending"]]
        plain["trace"] = [
            TracePoint(seconds, flops, loss, tuple(ids), asr) for seconds, flops, loss, ids, asr in plain["trace"]
        ]
        return cls(**plain, tensors=tensors)

    def write(self, path: Path) -> None:
        """Replaces the file in one move; raises OSError where that cannot be done, and leaves the old one then."""
        plain = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "tensors"}
        text = json.dumps(plain)
        part = path.with_name(path.name + ".part")
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(save(self.tensors, {"search": text, "digest": _digest(text, self.tensors)}))
        os.replace(part, path)


def difference(old: Plain, new: Plain) -> str:
    """What differs between two requests, by name; empty where nothing does."""
    new = json.loads(json.dumps(new))
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return ", ".join(f"{name} was {old.get(name)!r}, is {new.get(name)!r}" for name in names)


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of everything in the file."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
