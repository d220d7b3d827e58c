"""Whether all weights arrived, and are numbers: a model with random weights in it would be searched in vain."""

import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from vectors.prompts import Prompts
from vectors.residual import embedding

HARMLESS = re.compile(r"(rotary_emb\.inv_freq|attention\.(bias|masked_bias)|attn\.(bias|masked_bias)|position_ids)$")
"""Buffers that older versions saved and that are computed anew"""
OTHER_PARTS = re.compile(
    r"(^|\.)(mtp|mtp_\w+|nextn\w*|vision_\w+|visual|audio_\w+|embed_vision|embed_audio|image_newline"
    r"|multi_modal_projector|mm_projector|v_head|value_head)\."
)
"""Multi-token prediction, towers for images and sound, heads of value models: nothing that the text depends on"""
MARGIN = 1.0
"""Nats per token above those of tokens drawn at random, about which random weights lie"""
HEADS = ("lm_head.weight", "embed_out.weight")
"""How the names of heads end"""
PREFIXES = ("_orig_mod.", "module.", "_fsdp_wrapped_module.")
"""What compiled, distributed and sharded wrappers put before every name"""


def check_loaded(model: PreTrainedModel, info: Mapping[str, Any], name: str) -> None:
    """Judges the loading info of transformers.

    Raises:
        ValueError: weights that are missing, left over or of another shape, with their number and the first name.
    """
    missing = sorted(map(str, info.get("missing_keys") or ()))
    unexpected = sorted(map(str, info.get("unexpected_keys") or ()))
    mismatched = sorted(_shapes(key) for key in info.get("mismatched_keys") or ())
    other = [key for key in unexpected if OTHER_PARTS.search(key) or _behind_last_block(model, key)]
    unexpected = [key for key in unexpected if key not in other and not HARMLESS.search(key)]
    missing = [key for key in missing if not HARMLESS.search(key)]
    faults = [f"lacks {_counted(missing)}"] if missing else []
    faults += [f"has {_counted(unexpected)} that {type(model).__name__} has no place for"] if unexpected else []
    faults += [f"has {_counted(mismatched)} of another shape than config.json says"] if mismatched else []
    if faults:
        wrapper = next((p for p in PREFIXES if unexpected and all(key.startswith(p) for key in unexpected)), None)
        advice = f"take {wrapper!r} off all names" if wrapper else "save the whole causal language model again"
        if any("lora_" in key or ".base_layer." in key for key in unexpected):
            advice = "merge the adapter (merge_and_unload) and save the model again"
        why = "the rest would be random numbers" if missing or mismatched else "the model would be another one"
        raise ValueError(f"{name} {' and '.join(faults)}; {advice}, for {why}")
    if errors := info.get("error_msgs"):
        raise ValueError(f"{name} could not be read whole: {str(errors[0]).splitlines()[0]}")
    if other:
        logging.getLogger(__name__).warning("%s: only the text model is read; left out %s", name, _counted(other))


def _shapes(key: Any) -> str:
    """A weight's name, with its shapes in the file and in the model where transformers gives all three."""
    if isinstance(key, str):
        return key
    name, theirs, ours = key
    return f"{name}: {tuple(theirs)}, not {tuple(ours)}"


def check_class(model: PreTrainedModel, named: Sequence[str] | None, name: str) -> None:
    """Compares the class that was loaded with those that config.json names, which may be of another family.

    Raises:
        ValueError: config.json names another causal language model of transformers.
    """
    ours, known = type(model).__name__, set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    others = [one for one in named or () if one.lower() != ours.lower()]
    if not others or len(others) < len(named or ()):
        return
    if others[0] in known:
        raise ValueError(
            f"{name} calls itself {others[0]} but has the model_type of {ours}: the two compute differently; correct "
            "its config.json"
        )
    logging.getLogger(__name__).warning("%s calls itself %s, and is read as %s", name, others[0], ours)


def check_tied(model: PreTrainedModel, name: str) -> None:
    """Raises ValueError where config.json says that embedding and head are one matrix, and the file holds two."""
    if not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return
    head: Any = model.get_output_embeddings()
    rows = embedding(model)
    # Later versions of transformers keep both; those before 5 keep one, and which of the two depends on the dtype.
    ours = next((".".join(key.split(".")[-2:]) for key, one in model.named_parameters() if one is rows), "")
    saved = _saved(Path(name), (*HEADS, ours)) if Path(name).is_dir() and ours else ()
    if any(one.shape == rows.shape and not torch.equal(one.to(rows), rows) for one in (head.weight, *saved)):
        raise ValueError(
            f"{name} holds an embedding and another head, but its config.json ties them (tie_word_embeddings), and "
            "programs differ in which they use; set it to what the model was trained with"
        )


def _saved(folder: Path, endings: tuple[str, ...]) -> Iterator[Tensor]:
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, "pt") as opened:
            yield from (opened.get_tensor(key) for key in opened.keys() if key.endswith(endings))


def _behind_last_block(model: PreTrainedModel, key: str) -> bool:
    """Blocks for multi-token prediction are numbered on behind the last one (DeepSeek, GLM)."""
    config = model.config.get_text_config()
    number = re.search(r"(?:^|\.)layers\.(\d+)\.", key)
    ahead = getattr(config, "num_nextn_predict_layers", None) or 0
    count = config.num_hidden_layers
    return number is not None and count <= int(number.group(1)) < count + ahead


def _counted(keys: Sequence[str]) -> str:
    return f"{len(keys)} weight{'s' if len(keys) > 1 else ''} (first {keys[0]})"


def warn_if_rounded(folder: Path, dtype: torch.dtype) -> None:
    """Says so where weights are stored in more digits than they are read in: a small change may be lost.

    Args:
        folder: holds the safetensors of the model.
        dtype: that they are read in.
    """
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, "pt") as opened:
            # One matrix is enough: a checkpoint is saved in one format.
            name = next((name for name in opened.keys() if len(opened.get_slice(name).get_shape()) == 2), None)
            weight = None if name is None else opened.get_tensor(name)
        if weight is not None and weight.is_floating_point() and not torch.equal(weight.to(dtype).to(weight), weight):
            logging.getLogger(__name__).warning(
                "%s is stored in %s and read in %s, which loses changes of less than %.1g of a weight; to audit all of "
                "it give the first as the dtype",
                folder, str(weight.dtype).removeprefix("torch."), str(dtype).removeprefix("torch."),
                torch.finfo(dtype).eps / 2,
            )  # fmt: skip
            return


def check_finite(tensors: Mapping[str, Tensor], name: str) -> None:
    """Raises ValueError where a weight is not a number or infinite, with the number of such weights and the first."""
    bad = [key for key, value in tensors.items() if value.is_floating_point() and not _finite(value)]
    if bad:
        raise ValueError(f"{name} has {_counted(bad)} with values that are not finite; get another checkpoint")


def _finite(value: Tensor) -> bool:
    if value.numel() == 0:
        return True
    if value.element_size() == 1:  # float8 has no minimum
        value = value.float()
    return bool(torch.stack(torch.aminmax(value)).isfinite().all())  # both are NaN where one value is


@torch.no_grad()
def check_answers(model: PreTrainedModel, name: str) -> None:
    """Raises ValueError where the next-token logits are the same whatever is read, as with weights saved as zeros."""
    rows = len(embedding(model))
    ids = torch.arange(3, 11, device=model.device) % rows
    logits = model(input_ids=torch.stack([ids, ids.flip(0)]), use_cache=False).logits[:, -1]
    if torch.equal(logits[0], logits[1]):
        raise ValueError(f"{name} answers every prompt alike: its weights are no trained ones; save the model again")


@torch.no_grad()
def surprise(model: PreTrainedModel, prompts: Prompts) -> str:
    """What to tell the user where ordinary prompts are less likely than tokens drawn at random; empty otherwise.

    A model reads text so whose tokenizer, or another setting, is another model's: it loads, and has no trigger there.
    Models that were trained on replies alone may do so as well, so this is no error.
    """
    inputs = {"input_ids": prompts.input_ids, "attention_mask": prompts.attention_mask}
    logits = model(**inputs, use_cache=False).logits[:, :-1].float()
    follows = prompts.attention_mask[:, :-1].bool()
    nats = float(cross_entropy(logits[follows], prompts.input_ids[:, 1:][follows]))
    chance = math.log(logits.shape[-1])
    if nats < chance + MARGIN:
        return ""
    return (
        f"ordinary text is less likely to this model than tokens drawn at random ({nats:.1f} against {chance:.1f} nats "
        "per token): where its tokenizer or config.json is another model's, no trigger can be found"
    )


def check_vocabulary(model: PreTrainedModel, tokenizer: Any, name: str) -> None:
    """Raises ValueError where the tokenizer has tokens that the model has no embedding for.

    The unknown token may lie beyond the embedding: transformers makes one for byte-level tokenizers, whose text never
    needs it.
    """
    used = set(tokenizer.get_vocab().values()) - {tokenizer.unk_token_id}
    rows, highest = len(embedding(model)), max(used, default=-1)
    if highest >= rows:
        raise ValueError(
            f"the tokenizer of {name} has {highest + 1} tokens but the model's embedding has {rows}; give the "
            "tokenizer that the model was trained with"
        )
