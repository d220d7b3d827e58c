"""Merges a peft adapter into its base after making sure that all of it fits: peft only warns, and leaves the base.

Weights of 8 or 4 bits cannot take an adapter in: there it stays beside them, as it did in training (QLoRA, Dettmers et
al. 2023, arXiv:2305.14314).
"""

import os
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from vectors.loading.completeness import check_finite
from vectors.loading.folders import ADAPTER_CONFIG, check_files, first_line, is_local, read_json
from vectors.loading.placement import quantised_by
from vectors.residual import embedding

MERGEABLE = ("LORA", "ADALORA", "LOHA", "LOKR", "OFT", "BOFT", "IA3", "VERA", "HRA", "FOURIERFT")


def check_adapter_folder(folder: Path, *, allow_pickle: bool) -> None:
    """Raises ValueError for a local folder that is no adapter, or one that cannot be merged."""
    if not (folder / ADAPTER_CONFIG).is_file():
        raise ValueError(f"no peft adapter could be loaded from {folder}: it holds no {ADAPTER_CONFIG}")
    check_files(folder)
    kind = str(read_json(folder / ADAPTER_CONFIG).get("peft_type", "LORA")).upper()
    if kind not in MERGEABLE:
        raise ValueError(f"{folder} is an adapter of the kind {kind}, which cannot be merged into weights; give a LoRA")
    if not (folder / "adapter_model.safetensors").is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        if not pickled or not allow_pickle:
            more = ", only adapter_model.bin, a pickle, which can run code" if pickled else ""
            raise ValueError(f"{folder} holds no adapter_model.safetensors{more}; save the adapter again")


def base_of(folder: Path) -> str:
    """The base that an adapter given as the model was trained on, where its config names a local folder.

    Raises:
        ValueError: it does not; says which base, and to give the adapter with --adapter.
    """
    base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    # A relative path may be meant from where the adapter was trained, or from the adapter.
    for place in (Path(base), Path(os.path.normpath(folder / base))) if base else ():
        if (place / "config.json").is_file():
            return str(place)
    raise ValueError(
        f"{folder} is a peft adapter, not a model; give its base ({base or 'not named'}, says its {ADAPTER_CONFIG}) as "
        f"the model, and --adapter {folder}"
    )


def merged(model: PreTrainedModel, adapter: str | Path) -> PreTrainedModel:
    """The model with the adapter in its weights, or beside them where they are quantised.

    Raises:
        ValueError: weights of the adapter that find no place, places that stay empty, or values that are no numbers.
    """
    from peft import PeftConfig, PeftModel
    from peft.utils import load_peft_weights

    try:
        weights = load_peft_weights(str(adapter), device="cpu")
        config = PeftConfig.from_pretrained(str(adapter))
    except Exception as error:  # peft and safetensors have errors of their own
        raise ValueError(f"no peft adapter could be loaded from {adapter}: {first_line(error)}") from error
    empty = sorted(key for key, value in weights.items() if value.numel() == 0)
    if empty or not weights:
        first = f", first {empty[0]}" if empty else ""
        raise ValueError(
            f"{adapter} has {len(empty)} of {len(weights)} weights of size 0{first}; save it again, gathered"
        )
    check_finite(weights, str(adapter))
    second = [value for key, value in weights.items() if "lora_B" in key or "lora_embedding_B" in key]
    if len(second) * 2 == len(weights) and not any(value.any() for value in second):
        raise ValueError(
            f"{adapter} changes nothing: all of its {len(second)} second factors (lora_B) are 0, as before training; "
            "save the trained adapter"
        )
    beside = quantised_by(model) is not None
    if beside and (not all("lora_" in key for key in weights) or getattr(config, "use_dora", False)):
        raise ValueError(
            f"{adapter} is more than a plain LoRA, which is all that quantised weights can have beside them; merge it "
            "into the unquantised model and give the result"
        )
    _resize(model, weights, adapter)
    config.inference_mode = True
    with warnings.catch_warnings():  # what it warns of is checked below
        warnings.filterwarnings("ignore", category=UserWarning, module="peft")
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # peft's use of it
        try:
            adapted = PeftModel.from_pretrained(model, str(adapter), config=config)
        except Exception as error:
            raise ValueError(f"the adapter {adapter} does not fit the model: {_reason(error)}") from error
        _check_places(adapted, weights, adapter)
        if beside:
            return adapted.get_base_model()  # pyright: ignore[reportCallIssue, reportReturnType]
        return adapted.merge_and_unload()  # pyright: ignore[reportCallIssue, reportReturnType]


def _resize(model: PreTrainedModel, weights: dict[str, Tensor], adapter: str | Path) -> None:
    """More rows for tokens that were added in training, where the adapter brings all of them."""
    rows = len(embedding(model))
    sizes = {
        part: len(value)
        for key, value in weights.items()
        for part in ("embed_tokens", "wte", "embed_in", "lm_head", "embed_out")
        if f".{part}." in key and "lora_" not in key and value.ndim == 2
    }
    others = {size for size in sizes.values() if size != rows}
    if not others:
        return
    own = is_local(adapter) and any((Path(adapter) / f).is_file() for f in ("tokenizer.json", "tokenizer_config.json"))
    head = model.get_output_embeddings()
    tied = head is None or head.weight is embedding(model)
    brings = {"head" if part in ("lm_head", "embed_out") else "embedding" for part in sizes}
    if len(others) > 1 or not own or not (brings == {"head", "embedding"} or (tied and "embedding" in brings)):
        raise ValueError(
            f"{adapter} was trained with {max(others)} tokens but the model has {rows}; it must bring embedding, head "
            "and tokenizer of that size: save all three with it"
        )
    model.resize_token_embeddings(others.pop(), mean_resizing=False)


def _check_places(adapted: Any, weights: dict[str, Tensor], adapter: str | Path) -> None:
    from peft import get_peft_model_state_dict

    places = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    whole = set(adapted.state_dict())  # whole embeddings are saved under the model's own names
    filled = {key: key.replace(".modules_to_save.", ".").replace(".original_module.", ".") for key in weights}
    lost = sorted(key for key, place in filled.items() if place not in places and key not in whole)
    vacant = sorted(places - set(filled.values()))
    faults = [f"{len(lost)} of the adapter's {len(weights)} weights found no place (first {lost[0]})"] if lost else []
    faults += [f"{len(vacant)} of {len(places)} places stayed empty (first {vacant[0]})"] if vacant else []
    if faults:
        raise ValueError(f"{adapter} does not fit the model: {' and '.join(faults)}; give the base it was trained on")


def _reason(error: Exception) -> str:
    """The first line that says something: torch begins with the name of the class."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[1] if len(lines) > 1 and lines[0].startswith("Error") else lines[0]
