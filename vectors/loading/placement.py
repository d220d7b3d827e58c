"""Where the weights of a model lie and how many bits they take: options of every command that loads a model.

A model that one GPU does not hold is spread over several, block by block: accelerate moves what each block is called
with to that block's GPU. Weights of 8 or 4 bits are those of bitsandbytes, which passes gradients through both.
"""

import logging
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import get_balanced_memory
from transformers import BitsAndBytesConfig, PreTrainedModel

from vectors.command_line import help_from_docstrings

SPREAD = ("auto", "balanced", "sequential")
"""Ways to spread a model over all GPUs, which stand in the place of a device"""
SHARE = 0.8
"""Share of each GPU's free memory that weights may take; activations and cached keys and values need the rest"""


@dataclass(frozen=True, slots=True, kw_only=True)
@help_from_docstrings
class Placement:
    """Where weights lie, and how many bits they take."""

    device: str | None = None
    """Torch device such as cpu or cuda:1; where not given the GPU if there is one, else the CPU."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Format of the weights that are not quantised, and of products. auto is bfloat16 on a GPU, and on a CPU the faster
    of bfloat16 and float32, measured."""
    device_map: Literal["auto", "balanced", "sequential", "cpu"] | None = None
    """Spreads a model that is too large for one GPU over all of them: auto and balanced share it out evenly, sequential
    fills one after the other. cpu uses no GPU."""
    quantize: Literal["none", "8bit", "4bit"] = "none"
    """Loads the weights in 8 bits, or 4 (NF4), by bitsandbytes; the search has the gradients that it needs in both.
    Checkpoints that are quantised already are read if gradients pass through their kernels, and refused if not, as with
    most kernels for GPTQ and AWQ. GGUF files become plain weights."""

    @property
    def loading(self) -> dict[str, Any]:
        """The arguments of `load_model`; raises ValueError for a device that is not there."""
        if self.device is not None and self.device_map is not None:
            raise ValueError("--device and --device-map exclude each other; give one of them")
        device = self.device or self.device_map
        try:
            torch.empty(0, device=None if device in SPREAD else device)
        except (AssertionError, RuntimeError) as error:  # torch without CUDA asserts
            raise ValueError(f"no device {device!r}: {str(error).splitlines()[0]}") from error
        dtype = None if self.dtype == "auto" else getattr(torch, self.dtype)
        return {"device": device, "dtype": dtype, "quantize": self.quantize}


def device_or_best(device: str | None) -> str:
    """The device, or the GPU where there is one and none is named; a spread model needs no GPU to be loaded."""
    if device is None or (device in SPREAD and not torch.cuda.is_available()):
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def bits(quantize: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """How transformers is to quantise while it loads; raises ValueError where bitsandbytes is not installed."""
    if quantize not in ("8bit", "4bit"):
        raise ValueError(f"quantize is {quantize!r}; give none, 8bit or 4bit")
    if find_spec("bitsandbytes") is None:
        raise ValueError(
            f"--quantize {quantize} needs the package bitsandbytes; pip install 'trigger-recovery[quantized]'"
        )
    # It would say on every product in 8 bits that this is done in float16.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def spread(model: PreTrainedModel, way: str) -> None:
    """Moves a model from main memory to all GPUs, each block as a whole to one of them.

    Raises:
        ValueError: they do not hold it. What is left could stay in main memory, but not be searched: a gradient needs
            the weights of all blocks at once.
    """
    free = {number: int(SHARE * torch.cuda.mem_get_info(number)[0]) for number in range(torch.cuda.device_count())}
    room: Any = free
    whole = list(model._no_split_modules or ())
    if way != "sequential":
        room = get_balanced_memory(model, room, whole)
    places = infer_auto_device_map(model, room, whole)
    if any(place in ("cpu", "disk") for place in places.values()):
        needed = sum(weight.nbytes for weight in model.parameters())
        raise ValueError(
            f"the weights take {needed / 1e9:.1f} GB, more than the GPUs have room for "
            f"({sum(free.values()) / 1e9:.1f} GB); load fewer bits (--quantize 4bit)"
        )
    dispatch_model(model, places, skip_keys=list(model._skip_keys_device_placement or ()))


def quantised_by(model: PreTrainedModel) -> str | None:
    """The method by which the weights are quantised, as they are used; GGUF files have become plain weights."""
    method = getattr(model, "quantization_method", None) if getattr(model, "is_quantized", False) else None
    name = None if method is None else str(getattr(method, "value", method))
    return None if name == "gguf" else name


def format_of(model: PreTrainedModel) -> str:
    """What weights and activations are held in, such as `bfloat16` or `bitsandbytes 4-bit, bfloat16`."""
    dtype, method = str(model.dtype).removeprefix("torch."), quantised_by(model)
    if method is None:
        return dtype
    width = next((n for n in (4, 8) if getattr(model, f"is_loaded_in_{n}bit", False)), None)
    return f"{method}{f' {width}-bit' if width else ''}, {dtype}"
