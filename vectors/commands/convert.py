"""The commands export and import-gguf: one vector as the control vector file of llama.cpp and repeng, and back."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from vectors.analysis.cosines import theta_cosines
from vectors.analysis.figures import heatmaps
from vectors.commands.control_vector import export_gguf, import_gguf
from vectors.commands.files import Loading, Model, beside, check_free
from vectors.residual import decoder
from vectors.steering import SteeringVectors, model_id


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """Write one vector as a gguf control vector, for llama.cpp and repeng."""

    model: Model
    """folder in the Hugging Face layout, or a hub id; code that comes with the model is never run"""
    vectors: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="VECTORS")]
    """safetensors file of vectors, as learn writes it"""
    index: int
    """position in VECTORS of the vector to export, counted from 0"""
    out: Path
    """gguf file to write; a figure with the cosines of all vectors in VECTORS goes beside it"""
    overwrite: bool = False
    """replace output files that exist"""
    loading: Annotated[Loading, tyro.conf.arg(name="")] = Loading()

    def __call__(self, console: Console) -> int:
        """Writes, and says how to use it; always 0."""
        check_free([self.out], self.overwrite)
        model, _ = self.loading(self.model)
        vectors = SteeringVectors.load(self.vectors, model)
        layers = len(decoder(model).layers)
        export_gguf(vectors, self.index, self.out, model_type=model.config.model_type, layers=layers)
        title = f"theta of {self.vectors.name}, exported: {self.index}"
        for path in (self.out, *heatmaps({title: theta_cosines(vectors)}, beside(self.out, "-exported"))):
            console.print(f"wrote {path}", soft_wrap=True)
        block = vectors.source_layer - 1
        console.print(f"repeng: layer_ids=[{block}], strength 1 (the norm is in the file)")
        if block:
            console.print(f"llama.cpp: --control-vector {self.out}, for a gguf of the same model", soft_wrap=True)
        else:
            console.print("llama.cpp refuses direction.0: it needs a vector learned at source layer 2 or later")
        return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportGguf:
    """Read a gguf control vector and save it as a vectors file of this program."""

    model: Model
    """folder in the Hugging Face layout, or a hub id; code that comes with the model is never run"""
    gguf: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="GGUF")]
    """gguf file of a control vector, written by export or by another program such as repeng"""
    out: Path
    """safetensors file to write the vector to"""
    layer: int | None = None
    """N of the tensor direction.N to read (source layer N + 1); needed where the file holds several"""
    target_layer: int | None = None
    """number of blocks after which the vector's effect is read; needed where the file does not say"""
    radius: float | None = None
    """norm of the vector as a fraction of the mean residual norm at its layer; needed where the file does not say"""
    method: str | None = None
    """name of the method that the vector was learned by; needed where the file does not say"""
    overwrite: bool = False
    """replace output files that exist"""
    loading: Annotated[Loading, tyro.conf.arg(name="")] = Loading()

    def __call__(self, console: Console) -> int:
        """Reads, checks that it fits the model, saves; always 0."""
        check_free([self.out], self.overwrite)
        model, _ = self.loading(self.model)
        noted = {"target_layer": self.target_layer, "radius": self.radius, "method": self.method}
        # The name in the file is a path on another machine perhaps: whoever imports says which model it is for.
        vectors = import_gguf(self.gguf, layer=self.layer, model_id=model_id(model), **noted)
        vectors.check(model)
        vectors.save(self.out)
        console.print(f"wrote {self.out}: source layer {vectors.source_layer}", soft_wrap=True)
        return 0
