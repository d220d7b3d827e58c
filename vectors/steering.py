"""Steering vectors and where they belong: arithmetic, application to a model, storage, checks.

Also low-rank updates of an MLP's output matrix (steering adapters, Mack & Turner 2024), which are applied, ranked,
saved and compared like vectors; only what their rows mean differs.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from vectors.loading.digest import weights_digest
from vectors.methods.adapters.low_rank import adapt, mlp_output, mlp_width
from vectors.prompts import Prompts
from vectors.residual import cache_source, decoder, run_slice, steer

FIELDS = ("source_layer", "target_layer", "radius", "method", "model_id", "adapter_rank", "scores")


@dataclass(frozen=True, slots=True, kw_only=True)
class SteeringVectors:
    """k perturbations of one layer's residual stream."""

    theta: Float[Tensor, "k width"]
    """the vectors at the norm that they are added with (width d_model), or adapters as `low_rank.pack` lays them out"""
    source_layer: int
    """number of blocks after which the vectors are added, at every position"""
    target_layer: int
    """number of blocks after which the effect of the vectors is read"""
    radius: float
    """norm of the vectors as a fraction of the mean residual norm at the source layer"""
    method: str
    """name of the method that the vectors were learned by"""
    model_id: str
    """digest of the weights of the model that the vectors belong to (`vectors.loading.digest`)"""
    adapter_rank: int = 0
    """0: theta is added to the residual; r > 0: theta holds rank-r updates of the last source block's MLP output"""
    scores: dict[str, list[float]] = field(default_factory=dict)
    """by name, one number per vector: the objective reached, and what else the method measured"""

    def __len__(self) -> int:
        return len(self.theta)

    def __getitem__(self, index: int | slice | list[int]) -> "SteeringVectors":
        # IndexError past the last vector, which also ends a loop over them.
        part = [range(len(self))[index]] if isinstance(index, int) else index
        rows = range(len(self))[part] if isinstance(part, slice) else part
        scores = {name: [values[row] for row in rows] for name, values in self.scores.items()}
        return replace(self, theta=self.theta[part], scores=scores)

    def __add__(self, other: "SteeringVectors") -> "SteeringVectors":
        """Sums of vectors, row by row, or of all with one; the radius follows from the norm of the sums."""
        return self._combined(other, 1.0)

    def __sub__(self, other: "SteeringVectors") -> "SteeringVectors":
        """Differences of vectors, row by row, or of all with one."""
        return self._combined(other, -1.0)

    def __mul__(self, scale: float) -> "SteeringVectors":
        """Vectors of scaled norm; -1 gives the opposite vectors."""
        self._check_linear("*")
        return replace(self, theta=scale * self.theta, radius=abs(scale) * self.radius, scores={})

    __rmul__ = __mul__

    def __neg__(self) -> "SteeringVectors":
        return self * -1.0

    def _check_linear(self, sign: str) -> None:
        if self.adapter_rank:
            raise ValueError(f"{sign} is not defined for adapters, whose two matrices are not linear; use vectors")

    def _combined(self, other: "SteeringVectors", sign: float) -> "SteeringVectors":
        self._check_linear("+ or -")
        other._check_linear("+ or -")
        mine, yours = ((v.model_id, v.source_layer, v.theta.shape[1]) for v in (self, other))
        if mine != yours:
            raise ValueError(f"vectors of (model, source layer, width) {mine} and {yours} cannot be combined")
        if len(self) != len(other) and 1 not in (len(self), len(other)):
            raise ValueError(f"got {len(self)} and {len(other)} vectors; give equal numbers, or one of one side")
        theta = self.theta + sign * other.theta.to(self.theta)
        # The unit of radius is the mean residual norm, known only through a vector's own norm.
        known = self if self.radius else other
        unit = float(known.theta.norm(dim=-1).mean()) / known.radius if known.radius else 1.0
        return replace(self, theta=theta, radius=float(theta.norm(dim=-1).mean()) / unit, method="sum", scores={})

    def to(self, device: torch.device | str) -> "SteeringVectors":
        """The vectors on another device."""
        return replace(self, theta=self.theta.to(device))

    def check(self, model: PreTrainedModel) -> None:
        """Raises ValueError where the vectors do not fit the model: its name, width or depth."""
        parts = decoder(model)
        if not 0 <= self.source_layer < self.target_layer <= len(parts.layers):
            raise ValueError(
                f"vectors go from layer {self.source_layer} to {self.target_layer} but the model has "
                f"{len(parts.layers)} layers; use vectors of this model"
            )
        wanted = parts.d_model
        if self.adapter_rank:
            wanted = self.adapter_rank * (parts.d_model + mlp_width(mlp_output(model, self.source_layer)))
        if self.theta.shape[1] != wanted:
            raise ValueError(f"vectors have width {self.theta.shape[1]} but the model has {wanted}")

    @contextmanager
    def apply(self, model: PreTrainedModel, *, scale: float = 1.0, repeats: int = 1) -> Iterator[None]:
        """Steers a model, also while it generates; it is left as it was.

        Args:
            model: the model that the vectors were learned on.
            scale: factor of the vectors; 0 changes nothing at all.
            repeats: number of batch rows per vector, ordered by vector; a single vector serves a batch of any size.
        """
        self.check(model)
        theta = self.theta if len(self) == 1 else self.theta.repeat_interleave(repeats, dim=0)
        if self.adapter_rank:
            with adapt(model, self.source_layer, theta, self.adapter_rank, scale=scale):
                yield
        else:
            with steer(model, self.source_layer, theta[0] if len(self) == 1 else theta, scale=scale):
                yield

    def save(self, path: Path) -> None:
        """Writes one safetensors file."""
        meta = {name: getattr(self, name) for name in FIELDS}
        path.parent.mkdir(parents=True, exist_ok=True)
        # In one move at the end: an interrupted save leaves an older file as it was.
        part = path.with_suffix(path.suffix + ".part")
        theta = self.theta.detach().float().cpu().contiguous()
        save_file({"theta": theta}, part, metadata={"steering_vectors": json.dumps(meta)})
        part.replace(path)

    @classmethod
    def load(cls, path: Path, model: PreTrainedModel | None = None) -> "SteeringVectors":
        """Reads what `save` wrote; no code in it is ever run.

        Raises:
            ValueError: any other file, broken numbers, or vectors that do not fit `model` or belong to other weights.
        """
        try:
            with safe_open(path, framework="pt") as file:
                found = cls(theta=file.get_tensor("theta"), **json.loads(file.metadata()["steering_vectors"]))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no steering vectors: {error}") from error
        if found.theta.ndim != 2 or not found.theta.is_floating_point() or not bool(found.theta.isfinite().all()):
            shape, dtype = tuple(found.theta.shape), found.theta.dtype
            raise ValueError(f"{path} holds {dtype} of shape {shape}; vectors are finite floats of shape (k, width)")
        if model is not None:
            found.check(model)
            if found.model_id != model_id(model):
                raise ValueError(
                    f"{path} belongs to a model of other weights than {model.name_or_path or 'this one'}; "
                    "give the model that the vectors were learned on"
                )
            found = found.to(model.device)
        return found


@torch.no_grad()
def deltas(
    model: PreTrainedModel,
    prompts: Prompts,
    vectors: SteeringVectors,
    *,
    tokens: int | None = 1,
    batch_size: int = 512,
) -> Float[Tensor, "k n tokens d_model"]:
    """Change of the target-layer residual, per vector, prompt and position.

    Args:
        model: the model that the vectors were learned on.
        prompts: n prompts.
        vectors: k vectors or adapters.
        tokens: number of last positions; None: all. Changes at padding are 0.
        batch_size: number of batch rows (vectors x prompts) at a time.

    Raises:
        ValueError: tokens or batch_size below 1, or vectors that do not fit the model.
    """
    if batch_size < 1 or (tokens is not None and tokens < 1):
        raise ValueError(f"tokens is {tokens}, batch_size is {batch_size}; both must be at least 1 (tokens None: all)")
    vectors.check(model)
    # An adapter acts inside the last block before its source layer, so that block is part of the slice.
    first = max(vectors.source_layer - 1, 0) if vectors.adapter_rank else vectors.source_layer
    source, part = cache_source(model, prompts, first), slice(-tokens if tokens else None, None)
    to, count = vectors.target_layer, len(prompts)
    clean = run_slice(model, source, source.hidden, to=to)[:, part].float()
    found = []
    step = max(1, batch_size // count)
    for start in range(0, len(vectors), step):
        some = vectors[start : start + step]
        rows = source.hidden.repeat(len(some), 1, 1)
        if vectors.adapter_rank:
            with some.apply(model, repeats=count):
                steered = run_slice(model, source, rows, to=to)
        else:
            rows = rows + some.theta.to(rows).repeat_interleave(count, dim=0)[:, None]
            steered = run_slice(model, source, rows, to=to)
        found.append(steered[:, part].float().unflatten(0, (len(some), count)) - clean)
    real = prompts.attention_mask[:, part].bool()[..., None]
    # Rounding differs between batches of different sizes: what nothing was added to would seem to have changed.
    steers = vectors.theta.to(clean.device).any(-1)[:, None, None, None]
    return torch.cat(found).where(steers & real, torch.zeros((), device=clean.device))


def model_id(model: PreTrainedModel) -> str:
    """What vectors are tied to: a digest of the weights, for the same model may lie under many paths."""
    return weights_digest(model)
