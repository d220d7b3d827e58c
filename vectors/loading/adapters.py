"""Merges a peft adapter into its base after making sure that all of it fits: peft only warns, and leaves the base.

Weights of 8 or 4 bits cannot take an adapter in: there it stays beside them, as it did in training (QLoRA, Dettmers et
al. 2023, arXiv:2305.14314).
"""

import logging
import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vectors.loading.completeness import check_finite
from vectors.loading.folders import ADAPTER_CONFIG, check_files, first_line, inside, is_local, read_json
from vectors.loading.placement import quantised_by
from vectors.residual import embedding

NO_WEIGHTS = (
    "PROMPT_TUNING",
    "MULTITASK_PROMPT_TUNING",
    "P_TUNING",
    "PREFIX_TUNING",
    "ADAPTION_PROMPT",
    "CPT",
    "CARTRIDGE",
)
"""Kinds that put something before the text instead of changing weights"""
WRAPPERS = (
    ("_orig_mod.", ""),
    ("module.", ""),
    (".default.", "."),
    ("base_model.model.", ""),
    ("", "base_model.model."),
)
"""What other ways of saving put into every name or leave out of it, and what stands there otherwise"""


def check_adapter_folder(folder: Path, *, allow_pickle: bool) -> None:
    """Raises ValueError for a local folder that is no adapter, or one that cannot be merged."""
    if not (folder / ADAPTER_CONFIG).is_file():
        raise ValueError(
            f"no peft adapter could be loaded from {folder}: "
            f"{f'it holds no {ADAPTER_CONFIG}' if folder.is_dir() else 'it is no folder'}; "
            f"{inside(folder, ADAPTER_CONFIG) or 'give the folder of a saved adapter'}"
        )
    check_files(folder)
    settings = read_json(folder / ADAPTER_CONFIG)
    kind = str(settings.get("peft_type", "LORA")).upper()
    if kind in NO_WEIGHTS:
        raise ValueError(f"{folder} is an adapter of the kind {kind}, which cannot be merged into weights; give a LoRA")
    from peft import PeftType  # takes seconds to import

    if kind not in PeftType.__members__:
        raise ValueError(f"{folder} is an adapter of the kind {kind}, which this peft does not know; update peft")
    if not (folder / "adapter_model.safetensors").is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        if not pickled or not allow_pickle:
            more = ", only adapter_model.bin, a pickle, which can run code" if pickled else ""
            raise ValueError(f"{folder} holds no adapter_model.safetensors{more}; save the adapter again")
    if kind == "LORA" and (unsaid := [name for name in ("r", "lora_alpha") if settings.get(name) is None]):
        raise ValueError(
            f"{folder / ADAPTER_CONFIG} does not say {' and '.join(unsaid)}, which the size of the change depends on; "
            "save the adapter again with peft"
        )


def base_at_hand(folder: Path) -> str | None:
    """The base that an adapter was trained on, where its config names a folder that is there."""
    base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    # A relative path may be meant from where the adapter was trained, or from the adapter.
    for place in (Path(base), Path(os.path.normpath(folder / base))) if base and isinstance(base, str) else ():
        if (place / "config.json").is_file():
            return str(place)
    return None


def base_of(folder: Path) -> str:
    """As `base_at_hand`; raises ValueError where it is not there, which says which base, and to give --adapter."""
    if (found := base_at_hand(folder)) is not None:
        return found
    base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    raise ValueError(
        f"{folder} is a peft adapter, not a model; give its base ({base or 'not named'}, says its {ADAPTER_CONFIG}) as "
        f"the model, and --adapter {folder}"
    )


def merged(model: PreTrainedModel, adapter: str | Path, dtype: torch.dtype) -> tuple[PreTrainedModel, float]:
    """The model with the adapter in its weights, or beside them where they are quantised, and how much rounding keeps.

    Args:
        model: the base, in float32 where its weights are not quantised.
        adapter: folder or hub id.
        dtype: what the weights will be rounded to.

    Returns:
        The model, and the share of the adapter's change that rounding the weights to `dtype` keeps: 1 where all is kept
        or nothing is rounded.

    Raises:
        ValueError: weights of the adapter that find no place, places that stay empty, or values that are no numbers.
    """
    from peft import PeftConfig, PeftModel
    from peft.utils import load_peft_weights

    try:
        weights = load_peft_weights(str(adapter), device="cpu")
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            config = PeftConfig.from_pretrained(str(adapter))
    except Exception as error:  # peft and safetensors have errors of their own
        raise ValueError(f"no peft adapter could be loaded from {adapter}: {first_line(error)}") from error
    _check_weights(weights, adapter)
    unknown = [re.search(r"arguments (\[.*?\]) for class", str(warning.message)) for warning in said]
    for names in filter(None, unknown):
        logging.getLogger(__name__).warning("%s is of a newer peft; not known here: %s", adapter, names.group(1))
    beside = quantised_by(model) is not None
    if beside and (not all("lora_" in key for key in weights) or getattr(config, "use_dora", False)):
        raise ValueError(
            f"{adapter} is more than a plain LoRA, which is all that quantised weights can have beside them; merge it "
            "into the unquantised model and give the result"
        )
    _resize(model, weights, adapter)
    before = [] if beside else _sums(model, dtype)
    exactly = [] if beside else _sums(model, torch.float32)
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
            return adapted.get_base_model(), 1.0  # pyright: ignore[reportCallIssue, reportReturnType]
        share = _kept_share(adapted, dtype)
        whole = _merged(adapted.eval(), exactly, adapter)
        return whole, share if _sums(whole, dtype) != before else 0.0


def _check_weights(weights: dict[str, Tensor], adapter: str | Path) -> None:
    """Raises ValueError for weights that are empty, no numbers, of unknown size, or without effect."""
    empty = sorted(key for key, value in weights.items() if value.numel() == 0)
    if empty or not weights:
        first = f", first {empty[0]}" if empty else ""
        raise ValueError(
            f"{adapter} has {len(empty)} of {len(weights)} weights of size 0{first}; save it again, gathered"
        )
    check_finite(weights, str(adapter))
    small = sorted(key for key, value in weights.items() if value.element_size() == 1 or not value.is_floating_point())
    if small:
        raise ValueError(
            f"{adapter} holds {len(small)} weights (first {small[0]}) in the format {weights[small[0]].dtype}, whose "
            "size is not known; save the adapter in float32 or bfloat16"
        )
    second = [value for key, value in weights.items() if "lora_B" in key or "lora_embedding_B" in key]
    if len(second) * 2 == len(weights) and not any(value.any() for value in second):
        raise ValueError(
            f"{adapter} changes nothing: all of its {len(second)} second factors (lora_B) are 0, as before training; "
            "save the trained adapter"
        )


@torch.no_grad()
def _merged(adapted: Any, before: list[int], adapter: str | Path) -> PreTrainedModel:
    """The model with the adapter in its weights; `before` are their sums without it.

    Raises:
        ValueError: merging fails, changes no weight, or makes another model than the adapter beside the weights.
    """
    ids = torch.arange(3, 11, device=adapted.device)[None]
    try:
        beside = adapted(input_ids=ids, use_cache=False).logits
        model: Any = adapted.merge_and_unload()
    except Exception as error:  # each kind has errors of its own
        raise ValueError(f"{adapter} cannot be merged into weights: {_reason(error)}; give a plain LoRA") from error
    if _sums(model, torch.float32) == before:
        raise ValueError(f"{adapter} changes nothing: all weights are as without it; save the trained adapter")
    gap = (model(input_ids=ids, use_cache=False).logits - beside).abs().max() / beside.abs().max().clamp(min=1e-30)
    if not float(gap) < 0.001:  # float32, so that the two differ by rounding only
        raise ValueError(
            f"{adapter} does something that weights it is merged into do not (logits are off by {float(gap):.1%}); "
            "give a plain LoRA"
        )
    return model


@torch.no_grad()
def _kept_share(adapted: Any, dtype: torch.dtype) -> float:
    """The rounded weights' change along the adapter's own, per its squared length: sum(moved * delta) / sum(delta^2).

    Weights that lie on the grid of the format, as those of a base saved in it do, lose every change of less than half a
    step. A change that is no product of two matrices counts as kept.
    """
    kept = whole = 0.0
    for module in adapted.modules():
        if not hasattr(module, "get_delta_weight"):
            continue
        weight = module.get_base_layer().weight
        for name in module.active_adapters:
            delta = module.get_delta_weight(name) if name in getattr(module, "lora_A", {}) else None
            if delta is not None and delta.shape == weight.shape:
                moved = (weight + delta).to(dtype).float() - weight.to(dtype).float()
                kept, whole = kept + float((moved * delta).sum()), whole + float(delta.square().sum())
    return kept / whole if whole else 1.0


def _sums(model: PreTrainedModel, dtype: torch.dtype) -> list[int]:
    """Sums over the bits of each weight in this format, which any change of a weight changes."""
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]
    return [int(weight.detach().to(dtype).view(bits).sum(dtype=torch.int64)) for weight in model.parameters()]


def _resize(model: PreTrainedModel, weights: dict[str, Tensor], adapter: str | Path) -> None:
    """More rows for tokens that were added in training, where the adapter brings all of them."""
    rows = len(embedding(model))
    sizes = {
        part: len(value)
        for key, value in weights.items()
        for part in ("embed_tokens", "wte", "embed_in", "lm_head", "embed_out")
        if re.search(rf"\.{part}\.(base_layer\.|modules_to_save\.|original_module\.)?weight$", key)
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
    # Whole embeddings are saved under the model's own names.
    whole = {name for name in adapted.state_dict() if ".default." not in name}
    filled = {key: key.replace(".modules_to_save.", ".").replace(".original_module.", ".") for key in weights}
    lost = sorted(key for key, place in filled.items() if place not in places and key not in whole)
    vacant = sorted(places - set(filled.values()))
    faults = [f"{len(lost)} of the adapter's {len(weights)} weights found no place (first {lost[0]})"] if lost else []
    faults += [f"{len(vacant)} of {len(places)} places stayed empty (first {vacant[0]})"] if vacant else []
    if faults:
        advice = "give the base it was trained on"
        for there, here in WRAPPERS:
            right = [key.replace(there, here, 1) if there else here + key for key in lost]
            if lost and set(right) <= places:
                advice = f"name its first weight {right[0]}, and the others likewise"
        raise ValueError(f"{adapter} does not fit the model: {' and '.join(faults)}; {advice}")


def _reason(error: Exception) -> str:
    """The first line that says something: torch begins with the name of the class."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[1 if len(lines) > 1 and lines[0].startswith("Error") else 0].rstrip(".")
