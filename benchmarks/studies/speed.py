"""Seconds per search step, ours against nanoGCG's and TROPT's, with equal model, prompt, width, slot and dtype.

    python -m benchmarks.studies.speed
    python -m benchmarks.studies.speed --model smollm2 --steps 1 --repeats 3 --threads 1 --tropt ENVIRONMENT/bin/python
    python -m benchmarks.studies.speed --random-layers 2 --search-width 64 --steps 2

The second is a clean pretrained base (`python -m benchmarks.organisms fetch smollm2` brings it). The third is a model
of random weights with the layers of Llama 3.2 1B, as many as asked for (it has 16), and the model's vocabulary. All
take turns, measurement after measurement; with one CPU thread, processor time is taken. Floating-point operations a
second are set against a matrix product timed in the same run; products of the shapes that the blocks have show how near
to it any search of such a model could come.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import tyro
from jaxtyping import Float
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from attacks.objectives.delta_cosine import DeltaCosine
from attacks.objectives.target_nll import TargetNLL
from attacks.scoring.engine import Engine, Objective
from attacks.scoring.problem import Problem
from attacks.searchers.candidates import random_triggers
from attacks.searchers.gcg import GCG
from attacks.searchers.nanogcg import flops_per_step, run_once
from benchmarks import rows
from benchmarks.studies.real_size.models import loaded, random_vectors
from benchmarks.studies.real_size.tropt_peer import Tropt, running
from vectors.residual import decoder


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Settings of the comparison; they are the same for every contestant."""

    model: str = "phrase"
    """Organism whose model and first search prompt are used, or a pretrained base: smollm2 or gemma3."""
    search_width: int = 256
    """number of candidates per step"""
    trigger_length: int = 5
    """number of tokens in the slot"""
    topk: int = 128
    """number of tokens considered per position"""
    restarts: int = 1
    """triggers that ours searches side by side, where nanoGCG searches one: one keeps no large GPU busy"""
    steps: int = 6
    """number of steps of one measurement; the difference to a run of one step is timed"""
    repeats: int = 5
    """number of measurements, of which the median counts"""
    random_layers: int | None = None
    """layers of a random-weights model of 1B shape in the organism's place; None: the organism itself"""
    depth: float = 0.5
    """Fraction of the layers at which delta cosine reads."""
    tropt: Path | None = None
    """Python of an environment with tropt==0.1.1, which needs its own; None: TROPT is left out."""
    threads: int = 2
    """number of CPU threads"""
    out: Path | None = None
    """folder to write speed.json to; None: nothing is written"""


PRODUCT = {"cpu": 2048, "cuda": 8192}
"""Rows and columns of the matrices whose product gives the rate to compare with, by device"""

Run = Callable[[int], tuple[float, float]]
"""Runs so many steps and says how many seconds and floating-point operations they took"""


class Step(NamedTuple):
    """What one step takes."""

    seconds: float
    flops: float


def step(run: Run, steps: int) -> Step:
    """A run of `steps` + 1 steps less a run of one, so that set-up is not counted."""
    one, more = run(1), run(steps + 1)
    return Step((more[0] - one[0]) / steps, (more[1] - one[1]) / steps)


def clock() -> float:
    """Processor seconds where one thread works, so that other work on the machine does not count; else wall-clock."""
    synchronize()
    alone = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    return time.process_time() if alone else time.perf_counter()


def synchronize() -> None:
    """Waits for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def product_rate(model: PreTrainedModel) -> float:
    """Floating-point operations a second of a large square matrix product in the model's dtype."""
    size = PRODUCT.get(model.device.type, PRODUCT["cuda"])
    weight = torch.randn(size, size, device=model.device, dtype=model.dtype)
    return 2.0 * size**3 / seconds_of([weight], size)


def own_product_rate(model: PreTrainedModel, rows: int) -> float:
    """The same of `rows` tokens times each matrix of a block, and nothing else: more than any step can reach."""
    weights = [p for p in decoder(model).layers[0].parameters() if p.ndim > 1]
    return 2.0 * rows * sum(p.numel() for p in weights) / seconds_of(weights, rows)


def seconds_of(weights: Sequence[Float[Tensor, "out in"]], rows: int, repeats: int = 5) -> float:
    """Seconds of the products of `rows` random rows with each matrix; the best of a few times."""
    inputs = [torch.randn(rows, weight.shape[1], device=weight.device, dtype=weight.dtype) for weight in weights]
    times = []
    for _ in range(repeats + 1):
        began = clock()
        for row, weight in zip(inputs, weights, strict=True):
            torch.nn.functional.linear(row, weight)
        times.append(clock() - began)
    return min(times[1:])


def contestants(speed: Speed, stack: ExitStack) -> tuple[Engine, dict[str, Run]]:
    """(our engine, name -> function that runs so many steps); `stack` ends what was started.

    Raises:
        ValueError: settings that cannot be run, a model that is not here, an environment without TROPT.
    """
    if speed.restarts < 1:
        raise ValueError(f"restarts is {speed.restarts}; give at least 1")
    model, tokenizer, text, behaviour = loaded(speed.model, speed.random_layers)
    problem = Problem.from_chat(model, tokenizer, [text], speed.trigger_length)
    engine = Engine(model, problem, batch_size=speed.search_width * speed.restarts)
    gcg = GCG(search_width=speed.search_width, topk=speed.topk)
    source = engine.layers // 4
    vectors = random_vectors(model, source)
    target = tokenizer(behaviour, add_special_tokens=False)["input_ids"]
    permitted = problem.permitted(speed.trigger_length)
    gcg.check(permitted)  # nanoGCG has no words for it
    # The peers get the start as text, which must have as many tokens there.
    drawn = random_triggers(permitted, 256, torch.Generator().manual_seed(0))
    start = next((ids[None] for ids in drawn if problem.retokenizes(ids.tolist())), drawn[:1])
    layer = max(source + 1, round(speed.depth * engine.layers))
    cosine = DeltaCosine.from_vectors(engine, vectors, [layer])

    def ours(objective: Objective) -> Run:
        def run(steps: int) -> tuple[float, float]:
            began, booked = clock(), engine.flops
            settings = replace(gcg, steps=steps, restarts=speed.restarts, initial=start)
            settings(engine, objective, torch.Generator().manual_seed(0))
            return clock() - began, engine.flops - booked

        return run

    def peer(steps: int) -> tuple[float, float]:
        began = clock()
        run_once(engine, gcg, 0, behaviour, problem.text(start[0].tolist()), steps, 0)
        return clock() - began, steps * flops_per_step(engine, gcg, 0, behaviour)

    runs: dict[str, Run] = {
        "nanogcg": peer,
        "target-nll": ours(TargetNLL(target_ids=target)),
        f"delta-cosine, layer {layer} of {engine.layers}": ours(cosine),
    }
    if speed.tropt is not None:
        settings = {
            "template": problem.text(problem.before[0]) + "{trigger}" + problem.text(problem.after[0]),
            "target": behaviour, "start": problem.text(start[0].tolist()),
            "search_width": speed.search_width, "topk": speed.topk, "threads": speed.threads,
            "layer": layer, "direction": cosine.delta[layer][0].tolist(),
        }  # fmt: skip
        tropt = stack.enter_context(running(speed.tropt, model, tokenizer, settings))
        runs |= {f"tropt, {kind}": partial(_seconds_only, tropt, kind) for kind in ("target", "cosine")}
    return engine, runs


def _seconds_only(tropt: Tropt, kind: Literal["target", "cosine"], steps: int) -> tuple[float, float]:
    """Runs TROPT; it does not say how many operations that took."""
    return tropt.seconds(kind, steps), 0.0


def main(speed: Speed) -> None:
    """Measures, prints a table and the ratios, writes speed.json."""
    torch.set_num_threads(speed.threads)
    with ExitStack() as stack:
        try:
            engine, runs = contestants(speed, stack)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        if speed.tropt is None:
            print("TROPT is left out: --tropt gives the Python of an environment that has it", file=sys.stderr)
        measure(speed, engine, runs)


def measure(speed: Speed, engine: Engine, runs: dict[str, Run]) -> None:
    """Times all contestants in turn and reports."""
    for run in runs.values():
        run(1)
    measured: dict[str, list[Step]] = {name: [] for name in runs}
    rates: list[float] = []
    own_rates: list[float] = []
    tokens = speed.search_width * (speed.trigger_length + len(engine.problem.after[0]))
    for _ in range(speed.repeats):  # in turn, so that a slow minute of the machine hits all alike
        rates.append(product_rate(engine.model))
        own_rates.append(own_product_rate(engine.model, tokens))
        for name, run in runs.items():
            measured[name].append(step(run, speed.steps))
    peer = measured["nanogcg"]
    searched = {
        name: 1 if name in ("nanogcg", "tropt, target", "tropt, cosine") else speed.restarts for name in measured
    }
    ratios = {
        name: statistics.median(searched[name] * p.seconds / o.seconds for p, o in zip(peer, own, strict=True))
        for name, own in measured.items()
    }
    shares = {
        name: statistics.median(o.flops / o.seconds / rate for o, rate in zip(own, rates, strict=True))
        for name, own in measured.items()
    }
    beside = "" if speed.restarts == 1 else f" x {speed.restarts} restarts"
    what = speed.model if speed.random_layers is None else f"1B shape, {speed.random_layers} layers"
    own_share = statistics.median(own / rate for own, rate in zip(own_rates, rates, strict=True))
    title = (
        f"{what}, width {speed.search_width}{beside}; matrix product: {statistics.median(rates) / 1e9:.0f} GFLOP/s, "
        f"products of the blocks' own shapes: {100 * own_share:.0f} % of it"
    )
    table = Table(
        "step", "ms (median)", "times as fast as nanoGCG, per trigger", "GFLOP", "% of the matrix product", title=title
    )
    for name, own in measured.items():
        milliseconds = 1000 * statistics.median(o.seconds for o in own)
        counted = own[0].flops > 0
        share, operations = f"{100 * shares[name]:.0f}" * counted, f"{own[0].flops / 1e9:.1f}" * counted
        table.add_row(name, f"{milliseconds:.0f}", f"{ratios[name]:.2f}", operations, share)
    Console().print(table)
    if speed.out is not None:
        speed.out.mkdir(parents=True, exist_ok=True)
        report = {"steps": {name: [o._asdict() for o in own] for name, own in measured.items()}}
        report |= {"median_ratio_to_nanogcg": ratios, "median_share_of_product": shares}
        report |= {"median_share_of_own_products": own_share} | rows.provenance()
        (speed.out / "speed.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Speed))
