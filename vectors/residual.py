"""Reads and writes the residual stream of Hugging Face decoder models: early exit, slices, steering.

Residual l is the stream after l blocks: 0 is the embeddings, n the output of the last block, before the final norm.
Hooks live in context managers and are always removed; the model is never changed. A slice calls the later layers with
the very arguments that they got in one clean forward pass (masks by attention type, rotary embeddings, positions), so
no architecture has to be named. Blocks may lie on several devices, where accelerate moves a block's arguments to it:
what goes in and comes out lies where the embeddings do, so that nothing outside this module has to know.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from vectors.prompts import Prompts
from vectors.repeated_rows import plain_attention, repeat_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """The parts of a decoder model."""

    body: nn.Module
    """the model without its head"""
    layers: nn.ModuleList
    """the blocks, in order"""
    norm: nn.Module
    """final norm, between the last block and the unembedding"""
    head: nn.Module
    """unembedding, from the residual to logits"""
    d_model: int
    """width of the residual stream"""


class _Stop(Exception):
    """Ends a forward pass once the last wanted layer was read."""


def decoder(model: PreTrainedModel) -> Decoder:
    """Finds the blocks, the final norm and the head by their shape in the module tree.

    Raises:
        ValueError: the model has no such parts; the message says which were found.
    """
    head = model.get_output_embeddings()
    body = model.base_model
    # Models with a vision tower keep the text model inside; it holds the list of decoder layers.
    body = next((getattr(body, name) for name in ("language_model", "text_model") if hasattr(body, name)), body)
    count = model.config.get_text_config().num_hidden_layers
    lists = [m for m in body.children() if isinstance(m, nn.ModuleList) and len(m) == count]
    norms = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "embedding_norm")  # the last one: Lfm2
    norm = next((getattr(body, name) for name in norms if isinstance(getattr(body, name, None), nn.Module)), None)
    if head is None or len(lists) != 1 or norm is None:
        raise ValueError(
            f"{type(model).__name__} has no plain decoder: found {len(lists)} lists of {count} blocks, "
            f"final norm {norm is not None}, head {head is not None}; only causal decoders are supported"
        )
    return Decoder(body=body, layers=lists[0], norm=norm, head=head, d_model=embedding(model).shape[1])


def embedding(model: PreTrainedModel) -> Float[Tensor, "vocab d_model"]:
    """The token embedding matrix, one row per token of the vocabulary."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight


def check_layer(model: PreTrainedModel, layer: int, name: str = "layer") -> None:
    """Raises ValueError for a layer that the model does not have."""
    count = len(decoder(model).layers)
    if not 0 <= layer <= count:
        raise ValueError(f"{name} is {layer} but the model has {count} layers; give 0 to {count}")


def layer_at(model: PreTrainedModel, depth: float) -> int:
    """Number of the residual at a depth, a fraction of the layers in [0, 1]; not 0 nor the last, given two layers."""
    count = len(decoder(model).layers)
    return min(max(1, round(depth * count)), count - 1)


def stream(output: Any) -> Tensor:
    """The hidden states in a block's output, which is a tensor or a tuple by version of transformers."""
    return output if isinstance(output, Tensor) else output[0]


@contextmanager
def _reading(parts: Decoder, layers: Sequence[int], found: dict[int, Tensor], position: slice) -> Iterator[None]:
    """Stores the wanted residuals and stops the forward pass at the last of them."""
    last, handles = max(layers), []

    def on_input(_module, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        found[0] = hidden[:, position]
        if last == 0:
            raise _Stop

    def on_output(layer):
        def hook(_module, _args, output):
            found[layer] = stream(output)[:, position]
            if layer == last:
                raise _Stop

        return hook

    try:
        if 0 in layers:
            handles.append(parts.layers[0].register_forward_pre_hook(on_input, with_kwargs=True))
        handles += [parts.layers[n - 1].register_forward_hook(on_output(n)) for n in set(layers) - {0}]
        yield
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()


def read(
    model: PreTrainedModel, *, layers: Sequence[int], position: slice = slice(None), **inputs: Any
) -> dict[int, Float[Tensor, "batch seq d_model"]]:
    """Residuals after the given numbers of blocks; nothing later runs, and no logits.

    Args:
        model: a causal decoder.
        layers: which residuals, 0 (embeddings) to the number of blocks.
        position: which positions to keep.
        **inputs: of the forward pass: input_ids or inputs_embeds, attention_mask, position_ids, past_key_values
            (which is filled up to the last layer read). Padding needs its attention mask; position ids follow it.

    Raises:
        ValueError: no layer, or one that the model does not have.
    """
    if not layers:
        raise ValueError("got no layers to read; give at least one")
    for layer in layers:
        check_layer(model, layer)
    mask = inputs.get("attention_mask")
    if mask is not None and inputs.get("position_ids") is None:
        first = inputs.get("input_ids")
        first = inputs["inputs_embeds"] if first is None else first
        # Position 0 is the first real token, behind any padding; with a cache only the new tokens have positions.
        inputs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -first.shape[1] :]
    found: dict[int, Tensor] = {}
    parts = decoder(model)
    with _reading(parts, layers, found, position):
        parts.body(**inputs, use_cache=inputs.get("past_key_values") is not None)
    return {layer: found[layer].to(embedding(model).device) for layer in layers}


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Activations at the source layer, and what each later block was called with."""

    layer: int
    """number of blocks that have run, the source layer"""
    hidden: Float[Tensor, "n seq d_model"]
    """residual at the source layer"""
    mask: Tensor
    """attention mask of the prompts, (n, seq), 0 at padding"""
    calls: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...]
    """positional and keyword arguments, hidden states left out, that each later block was called with"""


@torch.no_grad()
def cache_source(model: PreTrainedModel, prompts: Prompts, layer: int) -> Source:
    """One clean forward pass that keeps the residual at `layer` and the arguments of every later block.

    Raises:
        ValueError: the layer is not before the last.
    """
    parts = decoder(model)
    if not 0 <= layer < len(parts.layers):
        last = len(parts.layers) - 1
        raise ValueError(f"source layer is {layer} but the model has {last + 1} layers; give 0 to {last}")
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    first: list[Tensor] = []

    def keep(_module, args, kwargs):
        # A copy: the block itself still needs all of its arguments.
        kwargs = dict(kwargs)
        hidden = args[0] if args else kwargs.pop("hidden_states")
        first.append(hidden)
        calls.append((tuple(args[1:]), kwargs))

    handles = [block.register_forward_pre_hook(keep, with_kwargs=True) for block in parts.layers[layer:]]
    try:
        positions = (prompts.attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        parts.body(
            input_ids=prompts.input_ids,
            attention_mask=prompts.attention_mask,
            position_ids=positions,
            use_cache=False,
        )
    finally:
        for handle in handles:
            handle.remove()
    return Source(layer=layer, hidden=first[0].to(prompts.device), mask=prompts.attention_mask, calls=tuple(calls))


def run_slice(
    model: PreTrainedModel, source: Source, hidden: Float[Tensor, "rows seq d_model"], *, to: int
) -> Float[Tensor, "rows seq d_model"]:
    """Residual at layer `to` when `hidden` stands at the source layer.

    Rows are k repetitions of the n prompts (row = repetition * n + prompt).
    """
    prompts = len(source.hidden)
    if len(hidden) % prompts:
        raise ValueError(f"{len(hidden)} rows are no multiple of the {prompts} prompts of the source")
    if not source.layer < to <= source.layer + len(source.calls):
        raise ValueError(f"target layer {to} is not behind source layer {source.layer}")
    repeats = len(hidden) // prompts
    blocks = decoder(model).layers[source.layer : to]
    repeated: dict[int, Any] = {}  # masks and rotary embeddings are shared between blocks: repeat each once
    with plain_attention(hidden):
        for block, (args, kwargs) in zip(blocks, source.calls, strict=False):
            again = [repeat_rows(arg, prompts, repeats, repeated) for arg in args]
            named = {name: repeat_rows(value, prompts, repeats, repeated) for name, value in kwargs.items()}
            hidden = stream(block(hidden, *again, **named))
    return hidden.to(source.hidden.device)


@contextmanager
def changed(model: PreTrainedModel, layer: int, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Puts `change(residual)` in the place of the residual after `layer` blocks, (batch, seq, d_model), in every pass.

    Raises:
        ValueError: a layer that the model does not have.
    """
    check_layer(model, layer)
    blocks = decoder(model).layers

    def on_input(_module, args, kwargs):
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    def on_output(_module, _args, output):
        return change(output) if isinstance(output, Tensor) else (change(output[0]), *output[1:])

    if layer == 0:
        handle = blocks[0].register_forward_pre_hook(on_input, with_kwargs=True)
    else:  # on the output, so that a later hook that reads this layer sees the change
        handle = blocks[layer - 1].register_forward_hook(on_output)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def steer(
    model: PreTrainedModel,
    layer: int,
    vectors: Float[Tensor, "rows d_model"] | Float[Tensor, "d_model"],
    *,
    scale: float = 1.0,
) -> Iterator[None]:
    """Adds a vector (one per batch row, or one for all) after `layer` blocks at every position, also while generating.

    Raises:
        ValueError: a layer that the model does not have, or vectors of another width.
    """
    width = decoder(model).d_model
    if vectors.ndim not in (1, 2) or vectors.shape[-1] != width:
        raise ValueError(f"vectors have shape {tuple(vectors.shape)}, the model needs (rows, {width})")
    added = scale * vectors.to(embedding(model))
    # (rows, 1, d_model): each row's vector at every position of that row.
    added = added[:, None] if added.ndim == 2 else added
    with changed(model, layer, lambda hidden: hidden + added.to(hidden.device)):
        yield


def unembed(model: PreTrainedModel, hidden: Float[Tensor, "... d_model"]) -> Float[Tensor, "... vocab"]:
    """Logits read off a residual through the final norm, the unembedding, and what the model does to logits."""
    return head_logits(model, decoder(model).norm(hidden))


def head_logits(model: PreTrainedModel, normed: Float[Tensor, "... d_model"]) -> Float[Tensor, "... vocab"]:
    """Logits of residuals that are behind the final norm already, scaled and soft-capped where the model does that."""
    config = model.config.get_text_config()
    logits = decoder(model).head(normed).to(embedding(model).device)
    if divisor := getattr(config, "logits_scaling", None):  # Granite
        logits = logits / divisor
    for name in ("logit_scale", "lm_head_multiplier"):  # Cohere; Falcon-H1
        if factor := getattr(config, name, None):
            logits = logits * factor
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    return cap * torch.tanh(logits / cap) if cap else logits


def mean_norm(source: Source) -> float:
    """Mean norm of the residual at the source, over real positions but the first, whose norm is an outlier."""
    real = source.mask.bool() & (source.mask.cumsum(-1) > 1)
    real = real if bool(real.any()) else source.mask.bool()  # prompts of one token have nothing else
    return float(source.hidden.float().norm(dim=-1)[real].mean())
