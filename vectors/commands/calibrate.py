"""calibrate: the norm that vectors should be learned at, on the model at hand."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
import tyro
from rich.console import Console
from rich.progress import track
from transformers import PreTrainedModel

from vectors.analysis.figures import radius_curve
from vectors.checks import check_positive
from vectors.commands.files import Loading, Model, check_free, write_json
from vectors.methods.unsupervised import UnsupervisedVectors
from vectors.prompts import Prompts, read_texts
from vectors.radius.completions import DiversityCusp, Judged, Learn
from vectors.radius.nonlinearity import Nonlinearity
from vectors.radius.rule import RadiusRule, check_radii, choose_radius
from vectors.radius.several import SeveralRadii
from vectors.residual import decoder

Judge = Callable[[list[str]], Sequence[float]]
RADII = (0.05, 0.1, 0.15, 0.25, 0.4, 0.65, 1.0, 1.6)
"""Tried where no others are given"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrate:
    """Choose the radius: from the non-linearity of the slice, or from the completions of vectors learned at several."""

    model: Model
    """folder in the Hugging Face layout, or a hub id; remote code is never run"""
    prompts: Path
    """text file, one ordinary user message per line"""
    rule: Literal["nonlinearity", "cusp", "several", "judged"]
    """several: radii round that of the non-linearity; judged: the one whose completions a function likes best"""
    radii: tuple[float, ...] | None = None
    """of cusp and judged: to try"""
    judge: str | None = None
    """of judged: module:function, which gets a list of completions and returns a score for each; it is imported"""
    target: float | None = None
    """of nonlinearity and several: wanted, fraction of the linear effect; 0.5 where not given"""
    source_layer: int | None = None
    """where vectors are added; a quarter of the depth where not given"""
    target_layer: int | None = None
    """where their effect is read; the last where not given"""
    learn_prompts: int = 2
    """of cusp and judged: lines learned on, the first of the file; completions are of the others"""
    count: int = 16
    """of cusp and judged: vectors per radius"""
    steps: int = 20
    """of cusp and judged: optimizer steps"""
    out: Path = Path("calibrate")
    """folder for radius.json and the curve"""
    seed: int = 0
    """of everything random"""
    overwrite: bool = False
    """replace files"""
    loading: Annotated[Loading, tyro.conf.arg(name="")] = Loading()

    def __call__(self, console: Console) -> int:
        """Chooses, prints, writes; always 0."""
        learns = self.rule in ("cusp", "judged")
        vain = {"radii": not learns, "judge": self.rule != "judged", "target": learns}
        for name, wrong in vain.items():
            if wrong and getattr(self, name) is not None:
                raise ValueError(f"--rule {self.rule} has no --{name}; leave it out")
        check_positive(self, "target", "learn_prompts", "count", "steps")
        if self.out.is_file():
            raise ValueError(f"--out {self.out} is a file; give a folder")
        check_free([self.out / "radius.json"], self.overwrite)
        if self.radii is not None:
            check_radii(self.radii, 5 if self.rule == "cusp" else 1)
        judge = self._judge()
        texts = read_texts(self.prompts, self.learn_prompts + 1 if learns else 1)
        model, tokenizer = self.loading(self.model)
        prompts = Prompts.from_chat(model, tokenizer, texts)
        seen = prompts.take(range(self.learn_prompts)) if learns else prompts
        held_out = prompts.take(range(self.learn_prompts, len(prompts))) if learns else prompts
        choice = choose_radius(
            model,
            tokenizer,
            held_out,
            self._rule(model, seen, judge),
            generator=torch.Generator().manual_seed(self.seed),
            progress=lambda radii: track(list(radii), description=self.rule, console=console),
        )
        console.print(f"{choice.rule}: radius {', '.join(f'{radius:.4g}' for radius in choice.radii)}")
        content = {"model": self.model, "adapter": self.loading.adapter, "seed": self.seed, **asdict(choice)}
        for path in (write_json(self.out / "radius.json", content), *radius_curve(choice, self.out / "radius_curve")):
            console.print(f"wrote {path}", soft_wrap=True)
        return 0

    def _rule(self, model: PreTrainedModel, seen: Prompts, judge: Judge | None) -> RadiusRule:
        layers = len(decoder(model).layers)
        source = max(1, layers // 4) if self.source_layer is None else self.source_layer
        slice_: dict[str, Any] = {"source_layer": source, "target_layer": self.target_layer or layers}
        if self.rule in ("nonlinearity", "several"):
            half_way = Nonlinearity(**slice_, target=0.5 if self.target is None else self.target)
            return half_way if self.rule == "nonlinearity" else SeveralRadii(centre=half_way)
        method = UnsupervisedVectors(**slice_, radius=1.0, count=self.count, steps=self.steps, lr=0.05)
        learn: Learn = lambda radius: replace(method, radius=radius)(model, seen, self._generator())  # noqa: E731
        if judge is None:
            return DiversityCusp(learn=learn, radii=self.radii or RADII)
        return Judged(learn=learn, radii=self.radii or RADII, judge=judge)

    def _generator(self) -> torch.Generator:
        """The same starts at every radius: what differs is the radius."""
        return torch.Generator().manual_seed(self.seed)

    def _judge(self) -> Judge | None:
        """The function that the user named; only then is anything imported."""
        if self.rule != "judged":
            return None
        module, _, name = (self.judge or "").partition(":")
        if not module or not name:
            raise ValueError(f"--rule judged got --judge {self.judge}; give module:function")
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"no judge {self.judge}: {error}") from error
        if callable(found):
            return cast(Judge, found)
        raise ValueError(f"the judge {self.judge} is {found!r}; give a function of a list of texts")
