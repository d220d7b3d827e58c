"""One steering vector as a gguf control vector, the file of repeng (Vogel 2024) and of llama.cpp.

Both add `direction.N` to the output of block N, counted from 0: that is residual N + 1 here, so source layer s is
`direction.(s - 1)`. The embeddings (source layer 0) have no name in such a file, and llama.cpp rejects a file with
`direction.0` (source layer 1), which repeng reads. repeng must be told the one layer: `layer_ids=[s - 1]`.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from torch import Tensor

from vectors.steering import SteeringVectors

ARCH = "controlvector"
OURS = "trigger_recovery"
"""Prefix of the metadata that only we read"""


def export_gguf(vectors: SteeringVectors, index: int, path: Path, *, model_type: str, layers: int) -> None:
    """Writes one vector at the norm that it is added with, so its strength in other programs is 1.

    Args:
        vectors: where it is taken from; its scores are not written.
        index: which one.
        path: of the file, replaced only once all is written.
        model_type: `config.model_type`, a hint for the reader.
        layers: blocks of the model.

    Raises:
        ValueError: no such vector, adapters instead of vectors, or a source layer that the format or the model has not.
    """
    if vectors.adapter_rank:
        raise ValueError("a gguf control vector cannot hold adapters of the MLP; export vectors that are added")
    if not 0 <= index < len(vectors):
        raise ValueError(f"index is {index} but there are {len(vectors)} vectors; give 0 to {len(vectors) - 1}")
    if not 1 <= vectors.source_layer < layers:
        raise ValueError(
            f"source layer is {vectors.source_layer}; a gguf control vector for a model of {layers} layers "
            f"can hold 1 to {layers - 1} (not 0, the embeddings)"
        )
    if not model_type:
        raise ValueError("model_type is empty; give the model's config.model_type")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(path.suffix + ".part")
    writer = GGUFWriter(part, ARCH)
    writer.add_string(f"{ARCH}.model_hint", model_type)
    writer.add_uint32(f"{ARCH}.layer_count", 1)
    writer.add_uint32(f"{OURS}.target_layer", vectors.target_layer)
    writer.add_float64(f"{OURS}.radius", vectors.radius)
    writer.add_string(f"{OURS}.method", vectors.method)
    writer.add_string(f"{OURS}.model_id", vectors.model_id)
    # At its full norm; block N writes residual N + 1, so source layer s is direction.(s - 1).
    direction = vectors.theta[index].detach().float().cpu().contiguous().numpy()
    writer.add_tensor(f"direction.{vectors.source_layer - 1}", direction)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    part.replace(path)


def import_gguf(
    path: Path,
    *,
    layer: int | None = None,
    target_layer: int | None = None,
    radius: float | None = None,
    method: str | None = None,
    model_id: str | None = None,
) -> SteeringVectors:
    """Reads one direction of a control vector; nothing in the file is executed.

    What is given goes before what `export_gguf` noted in the file. Files of other programs have no such notes, and
    repeng's directions have norm 1: scale them before use.

    Args:
        path: of the file.
        layer: N of `direction.N`, one less than the source layer; None: the only one there is.
        target_layer: read the vector's effect after this many blocks.
        radius: the vector's norm as a fraction of the mean residual norm at the source layer.
        method: how it was learned.
        model_id: of the model it belongs to.

    Raises:
        ValueError: no control vector, no such direction or several to choose from, or an unknown field not given.
    """
    reader = _open(path)
    found = _directions(reader, path)
    if layer is None and len(found) > 1:
        raise ValueError(f"{path} has directions at layers {sorted(found)}; choose one with layer")
    layer = next(iter(found)) if layer is None else layer
    if layer not in found:
        raise ValueError(f"layer is {layer} but {path} has directions at layers {sorted(found)}")
    given = {"target_layer": target_layer, "radius": radius, "method": method, "model_id": model_id}
    kinds = {"target_layer": int, "radius": float, "method": str, "model_id": str}
    # What the caller gives goes first; then what `export_gguf` noted in the file.
    noted = {name: _noted(reader, f"{OURS}.{name}", kind, path) for name, kind in kinds.items()}
    fields: dict[str, Any] = {name: noted[name] if value is None else value for name, value in given.items()}
    missing = [name for name, value in fields.items() if value is None]
    if missing:
        raise ValueError(f"{path} does not say {', '.join(missing)}; give {'them' if len(missing) > 1 else 'it'}")
    if fields["target_layer"] <= layer + 1:
        raise ValueError(
            f"target layer {fields['target_layer']} is not behind source layer {layer + 1} (direction.{layer})"
        )
    return SteeringVectors(theta=found[layer][None], source_layer=layer + 1, **fields)


class _WholeReader(GGUFReader):
    """Stops where the file does: the parent goes on with empty parts, for a corrupt array length without end."""

    def _get(self, offset, dtype, count=1, override_order=None):
        got = super()._get(offset, dtype, count, override_order)
        if len(got) != int(count):
            raise ValueError(f"the file ends within {count} values at byte {offset}")
        return got


def _open(path: Path) -> GGUFReader:
    """A reader of a control vector, whole to the last tensor."""
    try:
        with np.errstate(over="raise"):  # offsets of a corrupt file would wrap round
            reader = _WholeReader(path)
    except (ArithmeticError, LookupError, OSError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no gguf control vector: {error}") from error
    arch = _noted(reader, "general.architecture", str, path)
    if arch != ARCH:
        raise ValueError(f"{path} is no gguf control vector: its architecture is {arch!r}, not {ARCH!r}")
    return reader


def _directions(reader: GGUFReader, path: Path) -> dict[int, Tensor]:
    """Each direction by its N, checked, in float32 and independent of the file."""
    found: dict[int, Tensor] = {}
    for tensor in reader.tensors:
        name = re.fullmatch(r"direction\.(0|[1-9][0-9]*)", tensor.name)
        if name is None:
            raise ValueError(f"{path} is no gguf control vector: it has a tensor {tensor.name!r}, not direction.N")
        allowed = (GGMLQuantizationType.F32, GGMLQuantizationType.F16)
        if tensor.tensor_type not in allowed or tensor.data.ndim != 1 or not len(tensor.data):
            raise ValueError(
                f"{path} is no gguf control vector: {tensor.name} is {tensor.tensor_type.name} of shape "
                f"{tuple(tensor.shape.tolist())}; it must be F32 or F16 of shape (d_model,)"
            )
        found[int(name[1])] = torch.from_numpy(np.array(tensor.data, dtype=np.float32))
        if not found[int(name[1])].isfinite().all():
            raise ValueError(f"{path} is no gguf control vector: {tensor.name} has values that are not finite")
    if not found:
        raise ValueError(f"{path} is no gguf control vector: it has no directions")
    return found


def _noted(reader: GGUFReader, name: str, kind: type, path: Path) -> Any:
    """A metadata value, None where there is none."""
    field = reader.get_field(name)
    if field is None:
        return None
    try:
        value = field.contents()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no gguf control vector: {name} is no text: {error}") from error
    if not isinstance(value, kind):
        raise ValueError(f"{path} is no gguf control vector: {name} is {value!r}, not of type {kind.__name__}")
    return value
