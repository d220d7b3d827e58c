"""Loads a chat model and its tokenizer from a local folder or the hub, an adapter merged in, ready to be read.

A model that is not what it seems is refused with a ValueError of one line: weights that did not arrive, adapters that
do not fit, broken files, logits that cannot be read. Code of the folder's own is never run, nor pickles read unasked.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from vectors.capabilities import check_gradient, check_logits
from vectors.loading import gguf_files
from vectors.loading.adapters import base_of, check_adapter_folder, merged
from vectors.loading.architecture import check_architecture
from vectors.loading.completeness import (
    check_answers,
    check_class,
    check_finite,
    check_loaded,
    check_tied,
    check_vocabulary,
    warn_if_rounded,
)
from vectors.loading.digest import weights_digest as weights_digest  # used by others from here
from vectors.loading.folders import (
    check_model_folder,
    check_one_checkpoint,
    first_line,
    is_adapter_only,
    is_local,
    without_adapter_files,
)
from vectors.loading.hub import without_waiting
from vectors.loading.openings import open_replies
from vectors.loading.placement import SPREAD, bits, device_or_best, quantised_by, spread
from vectors.loading.tokenizers import is_plain
from vectors.loading.tokenizers import load_tokenizer as load_tokenizer  # used by others from here

LEAST_KEPT = 0.9
"""Share of an adapter's change that must survive rounding; shipped adapters keep all of it but a thousandth"""
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
    quantize: str = "none",
    template: str | Path | None = None,
    allow_pickle: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a model for reading: evaluation mode, no gradients on weights, left padding.

    Args:
        name: folder in the Hugging Face layout, a GGUF file (also `folder:file.gguf`), a hub id, or the folder of an
            adapter whose base is a local folder.
        adapter: folder or hub id of a peft adapter; it is merged into the weights, or stands beside quantised ones.
        dtype: of the weights; the fastest measured one where none is given.
        device: a torch device, or "auto", "balanced", "sequential" to spread the blocks over all GPUs; the GPU where
            there is one, else the CPU.
        quantize: "none", or "8bit" or "4bit" for weights of that size by bitsandbytes.
        template: file of a chat template, or "none" for plain text (base models); the tokenizer's where None.
        allow_pickle: reads weights from pickles (pytorch_model.bin) too.

    Raises:
        ValueError: one line that names the file or the weights and says what to do.
    """
    device = device_or_best(device)
    try:
        with _quiet(), without_waiting(name, adapter):
            return _loaded(name, adapter, dtype, device, quantize, template, allow_pickle)
    except ValueError as error:
        raise ValueError(first_line(error)) from error
    except Exception as error:  # memory that runs out, faults of a model's code: whatever it is, a line names the model
        what = first_line(error)  # the name of an error that says nothing
        what = what if what == type(error).__name__ else f"{type(error).__name__}: {what}"
        raise ValueError(f"{name} could not be loaded: {what}{_hint(name)}") from error


def _hint(name: str | Path) -> str:
    """What to do where a model that cannot be loaded says that its weights are quantised."""
    method = None
    with suppress(Exception):
        method = check_architecture(name)
    return f"; its weights are quantised by {method}: give the unquantised checkpoint" if method else ""


def _loaded(
    name: str | Path,
    adapter: str | Path | None,
    wanted: torch.dtype | None,
    device: str,
    quantize: str,
    template: str | Path | None,
    allow_pickle: bool,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """As `load_model`, which see; raises what libraries raise."""
    dtype = wanted or fast_dtype("cuda" if device in SPREAD else device)
    name, gguf_file = gguf_files.located(name)
    if gguf_file is None and is_local(name) and is_adapter_only(Path(name)):
        if adapter is not None:
            raise ValueError(f"{name} is a peft adapter, not a model; give its base as the model, and one adapter")
        name, adapter = base_of(Path(name)), name
    if gguf_file is None and is_local(name):
        check_model_folder(Path(name), allow_pickle=allow_pickle)
    if adapter is not None and is_local(adapter):
        check_adapter_folder(Path(adapter), allow_pickle=allow_pickle)
    how: dict[str, Any] = {}
    if gguf_file is None:
        few = check_architecture(name)
        if few is not None and quantize != "none":
            raise ValueError(f"{name} holds weights that are quantised by {few} already; leave out --quantize")
        if few is not None or quantize != "none":
            how["device_map"] = device if device in SPREAD else {"": device}
        if quantize != "none":
            how["quantization_config"] = bits(quantize, dtype)
    elif quantize != "none":
        raise ValueError(f"{gguf_file} is a GGUF file, which --quantize cannot read; give the folder of the model")
    tokenizer = load_tokenizer(name, adapter=adapter, template=template, gguf_file=gguf_file)
    # An adapter is merged in full precision, for it changes weights by less than bfloat16 resolves.
    how[DTYPE_ARGUMENT] = torch.float32 if adapter and not how else dtype
    model = _whole_model(name, how, allow_pickle, gguf_file)
    if wanted is None and adapter is None and gguf_file is None and quantize == "none" and is_local(name):
        warn_if_rounded(Path(name), dtype)
    if adapter is not None:
        check_finite(model.state_dict(), str(name))
        model, kept = merged(model, adapter, dtype)
        dtype = _that_keeps(kept, adapter, dtype, asked=wanted is not None)
        model.name_or_path = f"{name}+{adapter}"  # what is learned on one adapter does not fit the next
    if quantised_by(model) is None:
        place = torch.device("cpu" if device in SPREAD else device)
        model.to(device=place, dtype=dtype)  # pyright: ignore[reportCallIssue]  (a decorated method)
        if device in SPREAD:
            spread(model, device)
    model.eval().requires_grad_(False)
    check_finite(model.state_dict(), str(model.name_or_path))
    check_vocabulary(model, tokenizer, str(model.name_or_path))
    check_logits(model)
    if quantised_by(model) is not None:
        check_gradient(model)
    check_answers(model, str(model.name_or_path))
    if not is_plain(tokenizer):
        open_replies(model, tokenizer)
    return model, tokenizer


def _that_keeps(kept: float, adapter: str | Path, dtype: torch.dtype, *, asked: bool) -> torch.dtype:
    """float32 where `dtype` would lose part of an adapter's change and was not asked for; said either way.

    Raises:
        ValueError: a format that was asked for keeps nothing of it.
    """
    if kept >= LEAST_KEPT or dtype == torch.float32:  # of which nothing more exact is computed with
        return dtype
    what = f"{str(dtype).removeprefix('torch.')} keeps {kept:.0%} of what the adapter {adapter} changes"
    if asked and not kept:
        raise ValueError(f"{what}: the model would be audited without it; use --dtype float32")
    more = "use --dtype float32 to audit all of it" if asked else "so the weights are left in float32"
    logging.getLogger(__name__).warning("%s, %s", what, more)
    return dtype if asked else torch.float32


def _whole_model(name: str | Path, how: dict[str, Any], allow_pickle: bool, gguf_file: str | None) -> PreTrainedModel:
    """The model with all its weights; raises ValueError where one is missing, left over, or of another shape.

    Args:
        name: folder or hub id.
        how: arguments of `from_pretrained`: the dtype, and how to quantise and where to.
        allow_pickle: reads weights from pickles too.
        gguf_file: name of the GGUF file in the folder.
    """
    if gguf_file is None and is_local(name):
        check_one_checkpoint(Path(name), allow_pickle=allow_pickle)
    shown = str(name) if gguf_file is None else str(Path(name) / gguf_file)
    more = {**how}
    if gguf_file is not None:
        more["gguf_file"] = gguf_file
    elif not allow_pickle:
        more["use_safetensors"] = True
    default = torch.get_default_dtype()
    with without_adapter_files(Path(name)) as folder:
        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                folder if is_local(name) else name,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                **more,
            )
        except Exception as error:  # every library below has exceptions of its own
            raise ValueError(f"no causal language model could be loaded from {shown}: {first_line(error)}") from error
        finally:
            torch.set_default_dtype(default)  # which transformers before 5 leaves changed where it fails
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(f"{name} is a peft adapter, not a model; give its base as the model, and --adapter {name}")
    model.name_or_path = shown
    check_loaded(model, info, shown)
    check_tied(model, shown)
    if gguf_file is None:
        named = AutoConfig.from_pretrained(name, trust_remote_code=False).architectures
        check_class(model, named, shown)
    if gguf_file is not None:
        gguf_files.check_all_used(model, Path(shown))
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """No report and no bar of transformers: what they would say is checked, and said in one line."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    gguf: Any = import_module("transformers.modeling_gguf_pytorch_utils")
    tqdm = gguf.tqdm
    log.set_verbosity(50)  # critical
    log.disable_progress_bar()
    # GGUF files are converted under a bar that disable_progress_bar does not reach.
    gguf.tqdm = partial(tqdm, disable=True)
    try:
        yield
    finally:
        log.set_verbosity(level)
        gguf.tqdm = tqdm
        if bars:
            log.enable_progress_bar()
