"""Unsupervised vectors in one batch against the published procedure: one at a time, full forward passes.

    python -m benchmarks.studies.vectors_speed
    python -m benchmarks.studies.vectors_speed --compile --steps 1200 --repeats 1

The published side is timed on `sample` vectors for `sample_steps` steps and scaled up; the objective is compared on
vectors that both sides learn from the same start for the same number of steps. Memory is what a step keeps for its
backward pass, counted tensor by tensor.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import tyro
from jaxtyping import Float
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.compiler import config as compiler
from transformers import PreTrainedModel

from benchmarks.bad_input import exit_on_bad_input
from benchmarks.organisms import zoo
from vectors.methods.controls import random_directions
from vectors.methods.objectives import ChangeNorm
from vectors.methods.sphere import onto_sphere, tangent
from vectors.methods.unsupervised import UnsupervisedVectors, steered_source
from vectors.prompts import Prompts
from vectors.residual import cache_source, decoder, mean_norm, run_slice


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorsSpeed:
    """Settings of the comparison."""

    organism: str = "phrase"
    """organism whose model is used"""
    count: int = 100
    """number of vectors"""
    steps: int = 300
    """number of optimizer steps"""
    prompts: int = 1
    """number of prompts that each vector is learned on"""
    sample: int = 2
    """number of vectors per repeat that the published procedure is timed on"""
    sample_steps: int = 40
    """number of optimizer steps that the published procedure is timed for"""
    repeats: int = 3
    """number of measurements, of which the median counts"""
    parity_steps: int = 40
    """number of optimizer steps after which the objectives of both sides are compared"""
    compile: bool = False
    """compile the blocks; every measurement compiles anew and includes the time for that"""
    threads: int = 2
    """number of CPU threads"""


def one_at_a_time(
    model: PreTrainedModel, prompts: Prompts, method: UnsupervisedVectors, start: Float[Tensor, "d"]
) -> tuple[Float[Tensor, "d"], float]:
    """The published procedure: (vector, objective). Every step runs the whole model, unembedding included."""
    norm = method.radius * mean_norm(cache_source(model, prompts, method.source_layer))
    # Steps of Adam have the size of the learning rate, whatever the gradient: so it grows with the norm.
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


def kept_bytes(model: PreTrainedModel, prompts: Prompts, count: int, source_layer: int, target_layer: int) -> int:
    """Bytes that one step with `count` vectors keeps for its backward pass, each storage once, weights left out."""
    # By address: several saved tensors are views of one storage.
    source, storages = cache_source(model, prompts, source_layer), {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = (storage.nbytes(), tensor)  # kept alive: an address may come again
        return tensor

    width = source.hidden.shape[-1]
    theta = torch.zeros(count, width, device=source.hidden.device, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run_slice(model, source, steered_source(source, theta), to=target_layer)
    return sum(size for size, _ in storages.values())


def memory_table(model: PreTrainedModel, prompts: Prompts, source: int, target: int) -> Table:
    """Bytes kept per vectors x prompts x layers, and per residual number of the slice."""
    table = Table("vectors", "prompts", "layers", "MB", "bytes per vector x prompt x token x layer x d_model")
    tokens, width = prompts.input_ids.shape[1], decoder(model).d_model
    middle = (source + target) // 2
    for count, times, to in ((8, 1, target), (16, 1, target), (32, 1, target), (16, 2, target), (16, 1, middle)):
        rows = prompts.repeat(times)
        size = kept_bytes(model, rows, count, source, to)
        # Near a constant if what is kept grows with vectors x prompts x tokens x layers x width and nothing else.
        unit = size / (count * len(rows) * tokens * (to - source) * width)
        table.add_row(str(count), str(len(rows)), str(to - source), f"{size / 1e6:.1f}", f"{unit:.1f}")
    return table


def main(settings: VectorsSpeed) -> None:
    """Measures and prints a table."""
    torch.set_num_threads(settings.threads)
    compiler.force_disable_caches = True
    with exit_on_bad_input():
        organism = zoo.load(settings.organism)
    model = organism.model
    prompts = Prompts.from_chat(model, organism.tokenizer, organism.prompts.search[: settings.prompts])
    layers = len(decoder(model).layers)
    method = UnsupervisedVectors(
        source_layer=layers // 4,
        target_layer=layers - 1,
        radius=0.5,
        count=settings.count,
        steps=settings.steps,
        objective=ChangeNorm(),
        compile=settings.compile,
    )
    # The generator and seed of the method itself: row i is where its vector i starts.
    starts = random_directions(settings.count, decoder(model).d_model, torch.Generator().manual_seed(0))
    starts = starts.to(prompts.device)
    short = replace(method, steps=settings.sample_steps)
    batched, single = [], []
    method(model, prompts, torch.Generator().manual_seed(0), deadline=_twice())  # the first steps are slower
    for repeat in range(settings.repeats):
        # What is compiled is forgotten, so that each measurement pays for it.
        torch.compiler.reset()
        began = time.perf_counter()
        method(model, prompts, torch.Generator().manual_seed(0))
        batched.append(time.perf_counter() - began)
        began = time.perf_counter()
        for index in range(settings.sample):
            one_at_a_time(model, prompts, short, starts[repeat * settings.sample + index])
        per_step = (time.perf_counter() - began) / settings.sample / settings.sample_steps
        single.append(per_step * settings.count * settings.steps)
    ratio = statistics.median(s / b for s, b in zip(single, batched, strict=True))
    memory = memory_table(model, prompts, method.source_layer, method.target_layer)
    parity = replace(method, steps=settings.parity_steps)
    model.float()  # bfloat16 rounds a batch and a single row differently
    together = parity(model, prompts, torch.Generator().manual_seed(0)).scores["objective"]
    alone = [one_at_a_time(model, prompts, parity, start)[1] for start in starts[: settings.sample]]
    worst = max(abs(a / b - 1) for a, b in zip(alone, together, strict=False))
    table = Table("procedure", "seconds", title=f"{settings.count} vectors x {settings.steps} steps")
    table.add_row("one batch on the slice", f"{statistics.median(batched):.1f}")
    table.add_row("one at a time, full forwards (scaled up)", f"{statistics.median(single):.0f}")
    Console().print(memory, table, f"{ratio:.1f} times as fast; objective differs by at most {100 * worst:.3f} %")


def _twice() -> Callable[[], bool]:
    """A deadline after two steps."""
    left = iter((False, False))
    return lambda: next(left, True)


if __name__ == "__main__":
    main(tyro.cli(VectorsSpeed))
