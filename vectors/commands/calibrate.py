"""The command calibrate: the norm that vectors should be learned at on the model at hand."""

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
from vectors.radius.rule import RadiusRule, check_radii
from vectors.radius.several import SeveralRadii
from vectors.residual import decoder

Judge = Callable[[list[str]], Sequence[float]]
RADII = (0.05, 0.1, 0.15, 0.25, 0.4, 0.65, 1.0, 1.6)
"""Radii that are tried where none are given"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrate:
    """Choose the radius of vectors by how non-linear the layers are, or by what vectors of several radii elicit."""

    model: Model
    """folder in the Hugging Face layout, or a hub id; remote code is never run"""
    prompts: Path
    """clean prompts: text with one user message per line, a table (.jsonl, .json, .csv, .parquet), or a data set"""
    column: str | None = None
    """column that holds the prompts, where they are a table or a data set; guessed by its name where not given"""
    rule: Literal["nonlinearity", "cusp", "several", "judged"]
    """nonlinearity: layers half linear; several: radii round that; cusp: completions diverge; judged: best score"""
    radii: tuple[float, ...] | None = None
    """radii that the rules cusp and judged try, fractions of the mean residual norm at the source layer"""
    judge: str | None = None
    """module:function that scores a list of completions, for the rule judged; its module is imported and so runs"""
    target: float | None = None
    """non-linearity for the rules nonlinearity and several, fraction of the linear effect; 0.5 where not given"""
    source_layer: int | None = None
    """number of blocks after which the vectors are added; a quarter of the model's blocks where not given"""
    target_layer: int | None = None
    """number of blocks after which the vectors' effect is read; all blocks where not given"""
    learn_prompts: int = 2
    """number of first prompts that the rules cusp and judged learn vectors on; the other prompts are completed"""
    count: int = 16
    """number of vectors learned per radius by the rules cusp and judged"""
    steps: int = 20
    """number of optimizer steps per radius in the rules cusp and judged"""
    out: Path = Path("calibrate")
    """folder to write radius.json and the figure of the curve to"""
    seed: int = 0
    """seed of all random draws"""
    overwrite: bool = False
    """replace output files that exist"""
    loading: Annotated[Loading, tyro.conf.arg(name="")] = Loading()

    def __call__(self, console: Console) -> int:
        """Chooses, prints, writes; always 0."""
        learns = self.rule in ("cusp", "judged")
        # An option that the chosen rule would not look at is refused rather than ignored.
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
        texts = read_texts(self.prompts, self.learn_prompts + 1 if learns else 1, self.column)
        model, tokenizer = self.loading(self.model)
        prompts = Prompts.from_chat(model, tokenizer, texts)
        # Rules that read completions read those of prompts that no vector was learned on.
        seen = prompts.take(range(self.learn_prompts)) if learns else prompts
        held_out = prompts.take(range(self.learn_prompts, len(prompts))) if learns else prompts
        choice = self._rule(model, seen, judge)(
            model,
            tokenizer,
            held_out,
            torch.Generator().manual_seed(self.seed),
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
