"""Steering vectors and where they belong: saved as safetensors with metadata, checked against a model when used."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from vectors.prompts import Prompts
from vectors.residual import cache_source, decoder, run_slice


@dataclass(frozen=True, slots=True, kw_only=True)
class SteeringVectors:
    """k perturbations of one layer's residual stream."""

    theta: Float[Tensor, "k d_model"]
    """the vectors, at the norm they are added with"""
    source_layer: int
    """added to the residual after this many blocks, at every position"""
    target_layer: int
    """learned from their effect on the residual after this many blocks"""
    radius: float
    """norm as a fraction of the mean residual norm at the source layer"""
    method: str
    """how they were learned"""
    model_id: str
    """of the model they belong to"""
    scores: dict[str, list[float]] = field(default_factory=dict)
    """per vector: the objective reached, and what else the method measured"""

    def __len__(self) -> int:
        return len(self.theta)

    def __getitem__(self, index: int | slice) -> "SteeringVectors":
        part = slice(index, index + 1 or None) if isinstance(index, int) else index
        scores = {name: values[part] for name, values in self.scores.items()}
        return replace(self, theta=self.theta[part], scores=scores)

    def check(self, model: PreTrainedModel) -> None:
        """Raises ValueError where the vectors do not fit the model's width or depth."""
        parts = decoder(model)
        if self.theta.shape[1] != parts.d_model:
            raise ValueError(f"vectors have width {self.theta.shape[1]} but the model has {parts.d_model}")
        if not 0 <= self.source_layer < self.target_layer <= len(parts.layers):
            raise ValueError(
                f"vectors go from layer {self.source_layer} to {self.target_layer} but the model has "
                f"{len(parts.layers)} layers; use vectors of this model"
            )

    def save(self, path: Path) -> None:
        """Writes one safetensors file."""
        fields = ("source_layer", "target_layer", "radius", "method", "model_id", "scores")
        meta = {name: getattr(self, name) for name in fields}
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(path.suffix + ".part")
        theta = self.theta.detach().float().cpu().contiguous()
        save_file({"theta": theta}, part, metadata={"steering_vectors": json.dumps(meta)})
        part.replace(path)

    @classmethod
    def load(cls, path: Path) -> "SteeringVectors":
        """Reads what `save` wrote; raises ValueError for any other file."""
        try:
            with safe_open(path, framework="pt") as file:
                return cls(theta=file.get_tensor("theta"), **json.loads(file.metadata()["steering_vectors"]))
        except (OSError, SafetensorError, KeyError, TypeError) as error:
            raise ValueError(f"{path} holds no steering vectors: {error}") from error


@torch.no_grad()
def deltas(model: PreTrainedModel, prompts: Prompts, vectors: SteeringVectors) -> Float[Tensor, "k n d_model"]:
    """Change of the target-layer residual at the last prompt token, per vector and prompt."""
    vectors.check(model)
    source = cache_source(model, prompts, vectors.source_layer)
    clean = run_slice(model, source, source.hidden, to=vectors.target_layer)[:, -1].float()
    changed = [run_slice(model, source, source.hidden + theta.to(source.hidden), to=vectors.target_layer)[:, -1].float()
               for theta in vectors.theta]  # fmt: skip
    return torch.stack(changed) - clean


def model_id(model: PreTrainedModel) -> str:
    """Name that vectors are tied to."""
    return str(getattr(model, "name_or_path", "") or type(model).__name__)
