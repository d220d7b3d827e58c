"""Whether a model can do what not every architecture can, tried on one short input instead of listing architectures."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vectors.residual import decoder, embedding, read, unembed


@torch.no_grad()
def check_logits(model: PreTrainedModel) -> None:
    """Compares logits read off the last residual with the model's own, on one short input.

    Raises:
        ValueError: they differ: this architecture does something between the last block and its logits that is
            not known here, and every likelihood would be wrong.
    """
    ids = torch.arange(3, 11, device=model.device)[None] % len(embedding(model))
    last = len(decoder(model).layers)
    ours = unembed(model, read(model, layers=[last], input_ids=ids)[last]).float()
    true = model(input_ids=ids, use_cache=False).logits.float()
    gap = float((ours - true).abs().max() / true.abs().max().clamp(min=1e-30))
    if not gap < 0.02:  # in bfloat16 the two passes differ by rounding only
        raise ValueError(
            f"{type(model).__name__} computes its logits in a way that is not known here (off by {gap:.0%} on a test "
            "input), so likelihoods would be wrong; such models are not supported"
        )


@torch.no_grad()
def has_plain_cache(model: PreTrainedModel) -> bool:
    """Whether every block keeps keys and values of its own, and nothing else: no recurrent or convolution state.

    Seen on the cache of one short forward pass, so that no architecture has to be named.
    """
    parts = decoder(model)
    ids = torch.arange(3, 6, device=model.device)[None] % len(embedding(model))
    cache = parts.body(input_ids=ids, use_cache=True).past_key_values
    if cache is None:
        return False
    if hasattr(cache, "layers"):
        states = ("conv_states", "recurrent_states")
        if any(hasattr(layer, state) for layer in cache.layers for state in states):
            return False
        kept = [getattr(layer, "keys", None) for layer in cache.layers]
    else:  # transformers before 4.56; plain tuples of GPT-2 before 4.50
        kept = getattr(cache, "key_cache", None) or [layer[0] for layer in cache]
        if getattr(cache, "conv_states", None) or getattr(cache, "conv_cache", None):
            return False
    return len(kept) == len(parts.layers) and all(isinstance(keys, Tensor) and keys.numel() > 0 for keys in kept)


def check_gradient(model: PreTrainedModel) -> None:
    """Differentiates logits with respect to embeddings once; kernels of quantised weights often have no backward pass.

    A product without one only cuts its own branch off, and what is left of the gradient, along the residual stream,
    looks sound: so every module is watched. Call it behind another pass, for some kernels are packed in the first one.

    Raises:
        ValueError: a module's output does not depend on its input as far as gradients go, or the backward pass fails.
    """
    cut: list[str] = []

    def on_output(module: nn.Module, inputs: tuple, output: object) -> None:
        given = any(isinstance(part, Tensor) and part.requires_grad for part in inputs)
        if given and isinstance(output, Tensor) and output.is_floating_point() and not output.requires_grad:
            cut.append(type(module).__name__)

    handles = [m.register_forward_hook(on_output) for m in model.modules() if not any(True for _ in m.children())]
    ids = torch.arange(3, 11, device=model.device)[None] % len(embedding(model))
    try:
        rows = model.get_input_embeddings()(ids).detach().requires_grad_()
        with torch.enable_grad():
            logits = model(inputs_embeds=rows, use_cache=False).logits
            (gradient,) = torch.autograd.grad(logits.float().logsumexp(-1).sum(), rows)
        fault = f"no gradient through {cut[0]}" if cut else "" if gradient.isfinite().all() else "a gradient of nan"
    except (NotImplementedError, RuntimeError) as error:
        fault = f"no gradient: {str(error).strip().splitlines()[0]}"
    finally:
        for handle in handles:
            handle.remove()
    if fault:
        raise ValueError(
            f"the quantised weights of {model.name_or_path} have {fault} (on {model.device.type}), and the search "
            "needs one; load the unquantised weights, with --quantize 8bit or 4bit on a GPU where they are too large"
        )
