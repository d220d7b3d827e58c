"""Unsupervised vectors in one batch against the published procedure: one at a time, full forward passes.

    python -m benchmarks.vectors_speed

The published side is timed on `sample` vectors for `sample_steps` steps and scaled up; the objective is compared on
vectors that both sides learn from the same start for the same number of steps.
"""

import json
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from jaxtyping import Float
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks import rows
from benchmarks.organisms import zoo
from vectors.controls import random_directions
from vectors.objectives import ChangeNorm
from vectors.prompts import Prompts
from vectors.residual import cache_source, mean_norm
from vectors.unsupervised import UnsupervisedVectors, onto_sphere, tangent


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorsSpeed:
    """Settings of the comparison."""

    organism: str = "phrase"
    """whose model is used"""
    count: int = 64
    """vectors"""
    steps: int = 300
    """optimizer steps"""
    prompts: int = 1
    """prompts that each vector is learned on"""
    sample: int = 2
    """vectors that the published procedure is timed on, per repeat"""
    sample_steps: int = 40
    """steps that it is timed for"""
    repeats: int = 3
    """measurements; the median counts"""
    parity_steps: int = 40
    """steps after which the objectives are compared"""
    threads: int = 2
    """CPU threads"""
    out: Path | None = None
    """folder for vectors_speed.json"""


def one_at_a_time(
    model: PreTrainedModel, prompts: Prompts, method: UnsupervisedVectors, start: Float[Tensor, "d"]
) -> tuple[Float[Tensor, "d"], float]:
    """The published procedure: (vector, objective). Every step runs the whole model, unembedding included."""
    norm = method.radius * mean_norm(cache_source(model, prompts, method.source_layer))
    theta = onto_sphere(start[None], norm).requires_grad_()
    optimizer = torch.optim.Adam([theta], lr=method.lr * norm, betas=(0.9, 0.98), amsgrad=True, maximize=True)
    tokens = method.objective.tokens

    def hidden(vector: Tensor | None) -> Float[Tensor, "n tokens d"]:
        inputs = {"input_ids": prompts.input_ids, "attention_mask": prompts.attention_mask}
        if vector is None:
            return model(**inputs, output_hidden_states=True).hidden_states[method.target_layer][:, -tokens:]
        vector = vector.to(model.dtype)
        handle = model.model.layers[method.source_layer - 1].register_forward_hook(
            lambda _m, _a, output: output + vector if isinstance(output, Tensor) else (output[0] + vector, *output[1:])
        )
        try:
            return model(**inputs, output_hidden_states=True).hidden_states[method.target_layer][:, -tokens:]
        finally:
            handle.remove()

    with torch.no_grad():
        clean = hidden(None)
    for _ in range(method.steps):
        optimizer.zero_grad()
        method.objective(model, hidden(theta[0])[None], clean).sum().backward()
        assert theta.grad is not None
        theta.grad = tangent(theta.grad, theta.detach())
        optimizer.step()
        theta.data = onto_sphere(theta.data, norm)
    with torch.no_grad():
        return theta[0].detach(), float(method.objective(model, hidden(theta[0])[None], clean))


def main(settings: VectorsSpeed) -> None:
    """Measures, prints a table, writes vectors_speed.json."""
    torch.set_num_threads(settings.threads)
    try:
        organism = zoo.load(settings.organism)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    model = organism.model
    prompts = Prompts.from_chat(model, organism.tokenizer, organism.prompts.search[: settings.prompts])
    method = UnsupervisedVectors(
        source_layer=2, target_layer=7, radius=0.5, count=settings.count, steps=settings.steps, objective=ChangeNorm()
    )
    starts = random_directions(settings.count, model.config.hidden_size, torch.Generator().manual_seed(0))
    short = replace(method, steps=settings.sample_steps)
    batched, single = [], []
    for repeat in range(settings.repeats):
        began = time.perf_counter()
        method(model, prompts, torch.Generator().manual_seed(0))
        batched.append(time.perf_counter() - began)
        began = time.perf_counter()
        for index in range(settings.sample):
            one_at_a_time(model, prompts, short, starts[repeat * settings.sample + index])
        per_step = (time.perf_counter() - began) / settings.sample / settings.sample_steps
        single.append(per_step * settings.count * settings.steps)
    ratio = statistics.median(s / b for s, b in zip(single, batched, strict=True))
    parity = replace(method, steps=settings.parity_steps)
    model.float()  # bfloat16 rounds a batch and a single row differently
    together = parity(model, prompts, torch.Generator().manual_seed(0)).scores["objective"]
    alone = [one_at_a_time(model, prompts, parity, start)[1] for start in starts[: settings.sample]]
    worst = max(abs(a / b - 1) for a, b in zip(alone, together, strict=False))
    table = Table("procedure", "seconds", title=f"{settings.count} vectors x {settings.steps} steps")
    table.add_row("one batch on the slice", f"{statistics.median(batched):.1f}")
    table.add_row("one at a time, full forwards (scaled up)", f"{statistics.median(single):.0f}")
    Console().print(table, f"{ratio:.1f} times as fast; objective differs by at most {100 * worst:.3f} %")
    if settings.out is not None:
        settings.out.mkdir(parents=True, exist_ok=True)
        report = {"batched_s": batched, "one_at_a_time_s": single, "ratio": ratio, "objective_difference": worst}
        (settings.out / "vectors_speed.json").write_text(json.dumps(report | rows.provenance(), indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(VectorsSpeed))
