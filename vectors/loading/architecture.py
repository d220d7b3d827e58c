"""Whether config.json describes what can be searched: a causal language model, in weights that gradients pass through.

Both are known before any weight is read.
"""

from pathlib import Path
from typing import Any

import transformers
from packaging.version import Version
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.quantizers.auto import AutoHfQuantizer

from vectors.loading.folders import first_line, is_local


def check_architecture(name: str | Path) -> str | None:
    """Looks at a model's configuration; returns the method that its weights are quantised by, if they are.

    Args:
        name: folder in the Hugging Face layout, or hub id.

    Raises:
        ValueError: no causal language model, or quantised weights that no gradient passes through; says which, and why.
    """
    try:
        config: Any = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # whatever a broken or unknown config.json brings about
        hub = "" if is_local(name) else f"there is no folder {name}, and "
        raise ValueError(f"{hub}no causal language model could be loaded from {name}: {first_line(error)}") from error
    kind = config.model_type
    named = (getattr(config, "architectures", None) or [kind])[0]
    if config.is_encoder_decoder:
        why = (
            "an encoder-decoder: an encoder of its own reads the prompts, and no one residual stream goes through both"
        )
    elif kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        why = "an encoder: it fills gaps with text on both sides of them, and writes no replies"
    elif kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        why = f"of the type {kind}, which transformers knows no causal language model of"
    else:
        _check_positions(name, config)
        return _quantised(name, config)
    raise ValueError(f"{name} is {why} ({named}); give a causal language model, such as Llama or Qwen")


def _check_positions(name: str | Path, config: Any) -> None:
    """Raises ValueError where this transformers takes other settings of rotary positions than the ones that are meant.

    Since version 5 they stand in `rope_parameters`, which older versions pass over, to compute with their defaults.
    """
    said: dict[str, Any] = PretrainedConfig.get_config_dict(name)[0]
    said = said.get("text_config") or said
    given, old = said.get("rope_parameters"), Version(transformers.__version__) < Version("5")
    if not isinstance(given, dict):
        return
    # Old versions keep what they do not know, and have defaults for the rest.
    elsewhere = {"rope_type": "default", **config.get_text_config().to_dict()} if old else {**given, **said}
    elsewhere |= said.get("rope_scaling") or {}
    if other := next((key for key, value in given.items() if elsewhere.get(key) != value), None):
        if old:
            raise ValueError(
                f"{name} sets {other} in rope_parameters of its config.json, which transformers before 5 does not read "
                f"(this is {transformers.__version__}); update transformers"
            )
        raise ValueError(
            f"{name} gives {other} twice in its config.json, in rope_parameters and beside it, and versions of "
            "transformers differ in which they take; delete the one that the model was not trained with"
        )


def _quantised(name: str | Path, config: Any) -> str | None:
    settings = getattr(config, "quantization_config", None)
    if not settings:
        return None
    plain = settings if isinstance(settings, dict) else settings.to_dict()
    method = plain.get("quant_method", "an unknown method")
    method = str(getattr(method, "value", method))
    try:
        quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=True)
        quantizer.validate_environment()
        passes = quantizer.is_trainable
    except Exception as error:  # packages and devices that are not there, each in its own way
        raise ValueError(
            f"{name} holds weights quantised by {method}, which cannot be read here ({first_line(error)}); give the "
            "unquantised checkpoint"
        ) from error
    if not passes:
        raise ValueError(
            f"{name} holds weights quantised by {method}, which lets no gradient through, and the search needs one; "
            "give the unquantised checkpoint, with --quantize where it is too large"
        )
    return method
