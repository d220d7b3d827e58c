"""The clean base that a suspect is compared with (K2): a model that the user names, or the suspect without its adapter.

Only the base's answers to the suspect's tokens are asked for, so it needs neither tokenizer nor template of its own.
"""

import copy
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from attacks.scoring.problem import allowed_tokens
from vectors.loading.adapters import base_of
from vectors.loading.folders import is_adapter_only, is_local
from vectors.loading.placement import quantised_by
from vectors.models import load_model
from vectors.prompts import chat_text
from vectors.residual import embedding

ROOM = 1.5
"""Free memory that a second model must find, as a multiple of its weights: what a search needs comes on top"""


def named_base(
    base: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **loading: Any
) -> PreTrainedModel:
    """Loads the clean model that the user names; `loading` are further arguments of `load_model`.

    Raises:
        ValueError: it cannot be loaded, its tokens are not the suspect's, or its weights are.
    """
    clean, own = load_model(base, template="none", **{"dtype": model.dtype, **loading})
    theirs = own.get_vocab()
    others = sum(theirs.get(token, index) != index for token, index in tokenizer.get_vocab().items())
    if others or not _has_tokens(clean, model, tokenizer):
        raise ValueError(
            f"--base {base} has other tokens than the model ({len(embedding(clean))} and {len(embedding(model))}, "
            f"{others} of them at other places); give the model that it was trained from, or leave --base out"
        )
    if _same(clean, model):
        raise ValueError(
            f"--base {base} has the weights of the model itself, so that every trigger would count as working on a "
            "clean base; give the model that it was trained from, or leave --base out"
        )
    return clean


def _same(clean: PreTrainedModel, model: PreTrainedModel) -> bool:
    """Whether all weights are equal."""
    theirs, ours = (dict(one.named_parameters()) for one in (clean, model))
    return theirs.keys() == ours.keys() and all(
        weight.shape == ours[name].shape and torch.equal(weight.to(ours[name].device), ours[name])
        for name, weight in theirs.items()
    )


def base_without_adapter(
    name: str, adapter: str | None, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **loading: Any
) -> tuple[PreTrainedModel | None, str]:
    """(the suspect without its adapter or None, what to tell the user: empty where the suspect has no adapter).

    Args:
        name: what the user gave as the model: the adapter's base, or the folder of the adapter.
        adapter: what the user gave as the adapter, if anything.
        model: the suspect, adapter merged in.
        tokenizer: the suspect's.
        loading: further arguments of `load_model`.
    """
    if adapter is None:
        if not is_local(name) or not is_adapter_only(Path(name)):
            return None, ""
        name = base_of(Path(name))
    if lacking := _no_room(model):
        return None, f"the model without the adapter is not used as the clean base: {lacking}"
    clean, _ = load_model(name, template="none", **{"dtype": model.dtype, **loading})
    if not _has_tokens(clean, model, tokenizer):
        return None, "the model without the adapter is not used as the clean base: the adapter brings more tokens"
    return clean, (
        f"clean base: {name} without the adapter; a trigger that works there as well is passed over, so audit the "
        "base too, or give --no-base"
    )


def _has_tokens(clean: PreTrainedModel, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the base has an embedding for every token of the suspect's chats and triggers; others may be missing."""
    used = [*tokenizer(chat_text(tokenizer, "a"), add_special_tokens=False)["input_ids"]]
    return len(embedding(clean)) > max([*used, *allowed_tokens(model, tokenizer).nonzero()[:, 0].tolist()])


def _no_room(model: PreTrainedModel) -> str:
    """What memory another model of this size lacks; empty where it has room."""
    needed = ROOM * sum(weight.nbytes for weight in model.parameters())
    free = sum(map(_free_bytes, {weight.device for weight in model.parameters()}))
    return f"{needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free" if needed > free else ""


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def not_weakened(suspect: PreTrainedModel, base: PreTrainedModel) -> str:
    """Why there can be no copy of the suspect `at_strength`; empty where there can."""
    if _loras(suspect):
        return ""
    if method := quantised_by(suspect) or quantised_by(base):
        return f"weights that are quantised ({method}) cannot be mixed with the clean base's"
    return _no_room(suspect)


@torch.no_grad()
def at_strength(suspect: PreTrainedModel, base: PreTrainedModel, strength: float) -> PreTrainedModel:
    """A copy with the weights base + strength x (suspect - base): 0 is the base, 1 the suspect, above 1 amplified.

    Where an adapter stands beside its weights, which is then all that the suspect differs in, the adapter is scaled.
    """
    if _loras(suspect):
        # Modules without parts of their own are shared, so that all weights are: only what holds them is copied.
        shared = {id(module): module for module in suspect.modules() if not any(True for _ in module.children())}
        changed = copy.deepcopy(suspect, shared)
        for layer in _loras(changed):
            layer.scaling = {name: strength * scale for name, scale in layer.scaling.items()}
        return changed
    changed = copy.deepcopy(suspect)
    for new, clean in zip(changed.parameters(), base.parameters(), strict=True):
        new.copy_(clean.to(new.device) + strength * (new - clean.to(new.device)))
    return changed


def _loras(model: PreTrainedModel) -> list[Any]:
    """The matrices beside whose weights an adapter stands."""
    from peft.tuners.lora import LoraLayer  # takes a second to import

    return [module for module in model.modules() if isinstance(module, LoraLayer)]
