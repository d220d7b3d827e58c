"""Whether a model can do what not every architecture can, tried on one short input instead of listing architectures."""

import torch
from torch import Tensor
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
