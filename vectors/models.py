"""Loads a chat model and its tokenizer from a local folder or the hub, an adapter merged in, ready to be read.

Remote code is never executed.
"""

import time
from functools import lru_cache
from pathlib import Path

import torch
import transformers
from packaging.version import Version
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

DTYPE_ARGUMENT = "dtype" if Version(transformers.__version__) >= Version("4.56") else "torch_dtype"


@lru_cache
def fast_dtype(device: str) -> torch.dtype:
    """The faster of bfloat16 and float32 for a matrix product on this device, measured once per process.

    Processors without bfloat16 instructions run it many times slower than float32, those with them
    several times faster.
    """
    a = torch.ones(512, 256, device=device)

    def seconds(dtype: torch.dtype) -> float:
        left = a.to(dtype)
        right = torch.ones(256, 256, device=device, dtype=dtype)
        times = []
        for _ in range(5):
            began = time.perf_counter()
            (left @ right).sum().item()
            times.append(time.perf_counter() - began)
        return min(times)  # a busy machine makes some of them slow, never fast

    gpu = torch.device(device).type != "cpu"
    return torch.bfloat16 if gpu or seconds(torch.bfloat16) < seconds(torch.float32) else torch.float32


def load_model(
    name: str | Path,
    *,
    adapter: str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a model for reading: evaluation mode, no gradients on weights, left padding.

    Args:
        name: folder in the Hugging Face layout, or a hub id.
        adapter: folder or hub id of a peft adapter; it is merged into the weights.
        dtype: of the weights; the fastest measured one where none is given.
        device: the GPU where there is one, else the CPU.

    Raises:
        ValueError: nothing there, no config, no tokenizer, or no chat template.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or fast_dtype(device)
    tokenizer = load_tokenizer(name)
    try:
        model = AutoModelForCausalLM.from_pretrained(name, **{DTYPE_ARGUMENT: torch.float32 if adapter else dtype})
    except (OSError, ValueError) as error:
        raise ValueError(f"no causal language model could be loaded from {name}: {_first_line(error)}") from error
    if adapter is not None:
        from peft import PeftModel

        try:
            model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
        except (OSError, ValueError) as error:
            raise ValueError(f"no peft adapter could be loaded from {adapter}: {_first_line(error)}") from error
        model.name_or_path = f"{name}+{adapter}"  # what is learned on one adapter does not fit the next
    model.to(device=torch.device(device), dtype=dtype)  # pyright: ignore[reportCallIssue]  (a decorated method)
    return model.eval().requires_grad_(False), tokenizer


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """Loads a tokenizer that pads left; raises ValueError where the folder, it, or its chat template is missing."""
    folder = Path(name)
    looks_local = isinstance(name, Path) or folder.exists() or str(name).startswith((".", "/", "~"))
    if looks_local and not folder.is_dir():
        raise ValueError(f"no model folder {name}; give a folder with config.json, weights and tokenizer, or a hub id")
    if looks_local and not (folder / "config.json").is_file():
        raise ValueError(f"{name} holds no config.json; give the folder of a saved model")
    if looks_local and not any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json")):
        raise ValueError(f"{name} holds no tokenizer; save one there with tokenizer.save_pretrained({str(name)!r})")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"no tokenizer could be loaded from {name}: {_first_line(error)}") from error
    if not tokenizer.chat_template:
        raise ValueError(f"the tokenizer of {name} has no chat template; set tokenizer.chat_template and save it again")
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _first_line(error: Exception) -> str:
    """Libraries explain at length; one line is enough here."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
