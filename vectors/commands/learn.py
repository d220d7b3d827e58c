"""The command learn: vectors from clean prompts, saved with their learning curves and cosines."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from jaxtyping import Float
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from transformers import PreTrainedModel

from vectors.analysis.cosines import delta_cosines, theta_cosines
from vectors.analysis.figures import heatmaps, learning_curves
from vectors.checks import check_positive
from vectors.commands.files import SUFFIX, Loading, Model, beside, check_free
from vectors.methods.adapters.unsupervised import UnsupervisedAdapters
from vectors.methods.consensus import ConsensusVectors
from vectors.methods.diversity import Contrastive, SoftOrthogonality, Term
from vectors.methods.exponential_dct import ExponentialDCT
from vectors.methods.hessian import HessianVectors
from vectors.methods.jacobian import JacobianVectors
from vectors.methods.objectives import ChangeNorm, NormalizedChange, OutputKL
from vectors.methods.unsupervised import UnsupervisedVectors
from vectors.prompts import Prompts, read_texts
from vectors.radius.rule import check_radii
from vectors.residual import decoder
from vectors.steering import SteeringVectors

Method = Callable[..., SteeringVectors]
"""A dataclass with the fields `source_layer`, `target_layer`, `radius` and `count`, whose instances are called with
(model, prompts, generator); if they take `deadline` and `watch` as well, learning can be stopped and has a curve"""

METHODS: dict[str, Callable[..., Method]] = {
    "unsupervised": partial(UnsupervisedVectors, steps=20, lr=0.05),
    "consensus": ConsensusVectors,
    "adapters": partial(UnsupervisedAdapters, steps=20, lr=0.05),
    "jacobian": JacobianVectors,
    "hessian": HessianVectors,
    "dct": ExponentialDCT,
}
"""Builds a method from its fields; a new method needs one more line here"""
OBJECTIVES = {"kl": OutputKL, "norm": ChangeNorm, "normalized": NormalizedChange}
QUANTITIES = {
    "kl": "KL from the unsteered model (nats, sum over prompts)",
    "norm": "change of the residual (its units, sum over prompts)",
    "normalized": "change of the normalised residual (sum over prompts)",
    "consensus": "log-probability of the answer (nats per token)",
}
NEEDS = {
    "objective": {"objective"},
    "p": {"objective"},
    "q": {"objective"},
    "tokens": {"tokens", "objective"},
    "steps": {"steps", "iterations"},
    "lr": {"lr"},
    "orthogonal": {"orthogonal", "terms"},
    "contrastive": {"terms"},
    "batch_size": {"batch_size"},
}
"""Fields of which a method has one or more if an option applies to it; options given in vain are named"""
LACKING = {
    ("hessian", "objective", "normalized"),
    ("adapters", "orthogonal", "hard"),
    ("dct", "orthogonal", "none"),
}
"""(method, option, value) for which the method has the option but not the value"""
DRAWN = 64
"""Number of vectors, at most, whose cosines are drawn"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Learn:
    """Learn steering vectors on clean prompts, with no label and no trigger; draw learning curves and cosines.

    Example: python -m vectors learn path/to/model --prompts clean.txt --count 64 --out v.safetensors

    Ctrl-C ends the learning and keeps the vectors begun so far.
    """

    model: Model
    """folder in the Hugging Face layout, or a hub id; remote code is never run"""
    prompts: Path
    """clean prompts: text with one user message per line, a table (.jsonl, .json, .csv, .parquet), or a data set"""
    column: str | None = None
    """column that holds the prompts, where they are a table or a data set; guessed by its name where not given"""
    out: Path
    """safetensors file for the vectors; figures go beside it, and each of several radii gets a file of its own"""
    method: Annotated[str, tyro.conf.arg(metavar="{" + ",".join(METHODS) + "}")] = "unsupervised"
    """unsupervised, adapters: MELBO; consensus: one answer to all prompts; dct: exponential DCT; others: baselines"""
    objective: Annotated[Literal["kl", "norm", "normalized"] | None, tyro.conf.arg(metavar="{kl,norm,normalized}")] = (
        None
    )
    """what is maximised: KL of the next token, or the change of the (normalised) residual; kl where not given"""
    p: float | None = None
    """exponent of each token's change, for the objectives norm and normalized"""
    q: float | None = None
    """the q-th root is taken of the sum over a prompt's tokens, for the objectives norm and normalized"""
    tokens: int | None = None
    """number of last prompt tokens whose change counts; for the method consensus, tokens per answer"""
    source_layer: int | None = None
    """number of blocks after which the vectors are added; a quarter of the model's blocks where not given"""
    target_layer: int | None = None
    """number of blocks after which the effect is read; all blocks where not given"""
    radius: tuple[float, ...] = (0.3,)
    """norm of the vectors, fraction of the mean residual norm at the source layer; each of several gets its own set"""
    count: int = 100
    """number of vectors to learn per radius"""
    steps: int | None = None
    """number of optimizer steps or iterations; where not given 12 for consensus, 10 for dct, and 20 otherwise"""
    lr: float | None = None
    """AMSGrad step size, fraction of the vectors' norm; where not given 0.1 for consensus and 0.05 otherwise"""
    orthogonal: Annotated[Literal["none", "hard", "soft"] | None, tyro.conf.arg(metavar="{none,hard,soft}")] = None
    """hard: vectors are orthogonal; soft: a penalty keeps them apart; where not given hard for dct, else none"""
    contrastive: float | None = None
    """weight, fraction of the mean objective, of a term that rewards each vector for one effect on all prompts"""
    learn_prompts: int | None = None
    """number of prompts to learn on, the first lines of the file; where not given 12 for consensus and 2 otherwise"""
    batch_size: int | None = None
    """number of vectors learned at a time, fewer need less memory; the method's own default where not given"""
    seed: int = 0
    """seed of all random draws"""
    overwrite: bool = False
    """replace output files that exist"""
    loading: Annotated[Loading, tyro.conf.arg(name="")] = Loading()

    def __call__(self, console: Console) -> int:
        """Learns, saves, draws; 0, or 130 where it was interrupted."""
        self._check_options()
        check_radii(self.radius, 1)
        check_positive(self, "p", "q", "tokens", "count", "steps", "lr", "contrastive", "learn_prompts", "batch_size")
        paths = [self._path(radius) for radius in self.radius]
        # Before the model is loaded, which may take minutes.
        check_free(paths, self.overwrite)
        wanted = self.learn_prompts or (12 if self.method == "consensus" else 2)
        texts = read_texts(self.prompts, wanted, self.column)[:wanted]
        model, tokenizer = self.loading(self.model)
        prompts = Prompts.from_chat(model, tokenizer, texts)
        for radius, path in zip(self.radius, paths, strict=True):
            method = self._method(len(decoder(model).layers), wanted, radius)
            vectors, curves, stopped = self._run(method, model, prompts, console)
            vectors.save(path)
            console.print(f"wrote {path}: {len(vectors)} vectors, radius {radius}", soft_wrap=True)
            for figure in self._draw(model, prompts, vectors, curves, path):
                console.print(f"wrote {figure}", soft_wrap=True)
            if stopped:
                console.print(f"interrupted: {len(vectors)} of {self.count} vectors of radius {radius} are there")
                return 130
        return 0

    def _path(self, radius: float) -> Path:
        """Of a radius' file; one radius needs no name."""
        return self.out if len(self.radius) == 1 else beside(self.out, f"-R{radius}{self.out.suffix or SUFFIX}")

    @property
    def _fields(self) -> set[str]:
        """Names of the method's fields."""
        build = METHODS[self.method]
        return {field.name for field in fields(build.func if isinstance(build, partial) else build)}  # type: ignore

    def _given(self) -> dict[str, Any]:
        """Options of methods that were given."""
        return {name: getattr(self, name) for name in sorted(NEEDS) if getattr(self, name) is not None}

    def _check_options(self) -> None:
        """Raises ValueError for options that the method does not have, before anything is loaded."""
        if self.method not in METHODS:
            raise ValueError(f"--method is {self.method}; choose from {', '.join(METHODS)}")
        has = {name for name, needed in NEEDS.items() if needed & self._fields}
        if self.objective in (None, "kl") or self.method == "hessian":
            has = has - {"p", "q"}  # exponents of the other objectives
        for option in ("objective", "orthogonal"):
            if (self.method, option, getattr(self, option)) in LACKING:
                raise ValueError(f"--method {self.method} has no --{option} {getattr(self, option)}; choose another")
        vain = sorted(name for name in self._given() if name not in has)
        if vain:
            kind = f"{self.method} with --objective kl" if "objective" in has else self.method
            raise ValueError(f"--method {kind} has no --{' and no --'.join(vain)}; leave it out")

    def _method(self, layers: int, prompts: int, radius: float) -> Method:
        """The method with its settings; raises ValueError for impossible ones."""
        given, has = self._given(), self._fields
        source = max(1, layers // 4) if self.source_layer is None else self.source_layer
        target = layers if self.target_layer is None else self.target_layer
        settings = {"source_layer": source, "target_layer": target, "radius": radius, "count": self.count}
        settings |= {name: given[name] for name in ("steps", "lr", "batch_size") if name in given and name in has}
        if "steps" in given and "iterations" in has:
            settings["iterations"] = given["steps"]
        if "batch_size" in given and self.method == "consensus":  # its batches are counted in rows, not in vectors
            settings["batch_size"] = given["batch_size"] * prompts
        if "objective" in has:
            exponents = {name: given[name] for name in ("p", "q", "tokens") if name in given}
            settings["objective"] = OBJECTIVES[self.objective or "kl"](**exponents)
        elif "tokens" in given:
            settings["tokens"] = given["tokens"]
        if "terms" in has:
            soft: tuple[Term, ...] = (SoftOrthogonality(),) if self.orthogonal == "soft" else ()
            settings["terms"] = soft + (() if self.contrastive is None else (Contrastive(weight=self.contrastive),))
        if "orthogonal" in has and self.orthogonal is not None:
            # Where there are terms, a soft penalty is one of them.
            settings["orthogonal"] = "none" if "terms" in has and self.orthogonal == "soft" else self.orthogonal
        return METHODS[self.method](**settings)

    def _run(
        self, method: Any, model: PreTrainedModel, prompts: Prompts, console: Console
    ) -> tuple[SteeringVectors, Float[Tensor, "steps k"] | None, bool]:
        """(vectors, their values at each step, whether Ctrl-C was pressed); vectors not begun are left out."""
        generator = torch.Generator().manual_seed(self.seed)
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as progress:
            name = f"{self.method}, radius {method.radius}"
            if "watch" not in signature(method).parameters:
                progress.add_task(name, total=None)
                return method(model, prompts, generator), None, False
            each: int = method.steps
            bar = progress.add_task(name, total=each * self.count)
            history: list[Tensor] = []

            def watch(values: Tensor) -> None:
                history.append(values.detach().float().cpu())
                progress.advance(bar, len(values))

            with stoppable() as stopped:
                vectors = method(model, prompts, generator, deadline=stopped, watch=watch)
            if not history:  # stopped before the first step: there is nothing to save
                raise KeyboardInterrupt
            # `watch` is called once per step, `each` times per batch: every `each`-th entry begins another batch.
            begun = sum(map(len, history[::each]))
            steps = min(each, len(history))
            starts = range(0, len(history) - steps + 1, each)  # of the batches that were learned to the end
            curves = torch.cat([torch.stack(history[start : start + steps]) for start in starts], dim=1)
            return vectors[:begun], curves, stopped()

    def _draw(
        self,
        model: PreTrainedModel,
        prompts: Prompts,
        vectors: SteeringVectors,
        curves: Float[Tensor, "steps k"] | None,
        path: Path,
    ) -> list[Path]:
        """Learning curves, and cosines of theta and of its effects."""
        files = []
        if curves is not None:
            quantity = QUANTITIES["consensus" if self.method == "consensus" else self.objective or "kl"]
            if self.contrastive is not None or self.orthogonal == "soft":
                quantity = "objective with its terms (sum over prompts)"
            files = learning_curves(curves, beside(path, "-learning"), quantity=quantity)
        some = vectors[:DRAWN]
        named = {} if vectors.adapter_rank else {"theta": theta_cosines(some)}
        named["delta, all tokens"] = delta_cosines(model, prompts, some, tokens=None)
        named["delta, last token"] = delta_cosines(model, prompts, some)
        return files + heatmaps(named, beside(path, "-cosines"))


@contextmanager
def stoppable() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed; a second one interrupts at once."""
    pressed: list[int] = []

    def stop(number: int, _frame: object) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)
