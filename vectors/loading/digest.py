"""Knows a model by its weights rather than by the path that it was loaded from."""

import hashlib

import torch
from transformers import PreTrainedModel

SAMPLE = 4096
"""Values that are looked at per weight, spread evenly"""


@torch.no_grad()
def weights_digest(model: PreTrainedModel) -> str:
    """SHA-256 over names, shapes and a fixed sample of the values of all weights, in hexadecimal.

    Values count as bfloat16, so that a model is the same one in float32 and in bfloat16, on a CPU and on a GPU.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        flat = weight.detach().reshape(-1)
        step = max(1, len(flat) // SAMPLE)
        sample = flat[::step][:SAMPLE].to(torch.bfloat16).cpu()
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
