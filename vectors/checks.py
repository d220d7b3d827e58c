"""Checks of settings that all methods share; each raises a ValueError that names the setting."""

from transformers import PreTrainedModel

from vectors.prompts import Prompts
from vectors.residual import decoder


def check_layers(source_layer: int, target_layer: int) -> None:
    """Raises ValueError unless the source comes before the target."""
    if not 0 <= source_layer < target_layer:
        raise ValueError(f"source layer {source_layer} is not before target layer {target_layer}; lower source_layer")


def check_positive(settings: object, *names: str) -> None:
    """Raises ValueError if a named setting is 0 or less; a setting of None is not checked."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and value <= 0:
            raise ValueError(f"{name} is {value}; it must be more than 0")


def check_model(model: PreTrainedModel, target_layer: int, orthogonal: int = 0) -> None:
    """Raises ValueError for a layer that the model does not have, or more orthogonal vectors than dimensions."""
    parts = decoder(model)
    if target_layer > len(parts.layers):
        raise ValueError(f"target layer is {target_layer} but the model has {len(parts.layers)} layers")
    if orthogonal > parts.d_model:
        raise ValueError(f"{orthogonal} orthogonal vectors do not fit into {parts.d_model} dimensions; lower count")


def check_tokens(prompts: Prompts, tokens: int) -> None:
    """Raises ValueError for prompts shorter than the positions that are read: padding would count."""
    shortest = int(prompts.attention_mask.sum(1).min())
    if shortest < tokens:
        raise ValueError(f"the objective reads {tokens} positions but a prompt has {shortest} tokens; lower tokens")
