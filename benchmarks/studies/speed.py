"""Seconds per search step, ours against nanoGCG's, with equal model, prompt, width, slot and dtype.

    python -m benchmarks.studies.speed
    python -m benchmarks.studies.speed --random-layers 2 --search-width 64 --steps 2

The second is a model of random weights with the layers of Llama 3.2 1B, as many as asked for (it has 16), and the
organism's vocabulary. Floating-point operations a second are set against a matrix product timed in the same run;
products of the shapes that the blocks have show how near to it any search of such a model could come.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import tyro
from jaxtyping import Float
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from attacks.objectives.delta_cosine import DeltaCosine
from attacks.objectives.target_nll import TargetNLL
from attacks.scoring.engine import Engine, Objective
from attacks.scoring.problem import Problem
from attacks.searchers.candidates import random_triggers
from attacks.searchers.gcg import GCG
from attacks.searchers.nanogcg import flops_per_step, run_once
from benchmarks import rows
from benchmarks.organisms import zoo
from vectors.methods.controls import random_directions
from vectors.residual import decoder
from vectors.steering import SteeringVectors, model_id


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Settings of the comparison; they are the same for every contestant."""

    organism: str = "phrase"
    """organism whose model and first search prompt are used"""
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
    layers_skipped: int = 1
    """delta cosine reads this many layers before the last"""
    threads: int = 2
    """number of CPU threads"""
    out: Path | None = None
    """folder to write speed.json to; None: nothing is written"""


PRODUCT = {"cpu": 2048, "cuda": 8192}
"""Rows and columns of the matrices whose product gives the rate to compare with, by device"""

Run = Callable[[int], float]
"""Runs so many steps and says how many floating-point operations they took"""


class Step(NamedTuple):
    """What one step takes."""

    seconds: float
    flops: float


def step(run: Run, steps: int) -> Step:
    """A run of `steps` + 1 steps less a run of one, so that set-up is not counted."""
    times, flops = [], []
    for count in (1, steps + 1):
        began = time.perf_counter()
        flops.append(run(count))
        synchronize()
        times.append(time.perf_counter() - began)
    return Step((times[1] - times[0]) / steps, (flops[1] - flops[0]) / steps)


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
        began = time.perf_counter()
        for row, weight in zip(inputs, weights, strict=True):
            torch.nn.functional.linear(row, weight)
        synchronize()
        times.append(time.perf_counter() - began)
    return min(times[1:])


def of_1b_shape(like: PreTrainedModel, layers: int) -> PreTrainedModel:
    """Random weights in layers like those of Llama 3.2 1B, with the vocabulary, context and dtype of another model."""
    config = LlamaConfig(
        vocab_size=like.config.vocab_size,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=like.config.max_position_embeddings,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with like.device:  # a billion random numbers take a CPU half a minute
        network: Any = LlamaForCausalLM(config)
    return network.eval().requires_grad_(False).to(like.dtype)


def contestants(speed: Speed) -> tuple[Engine, dict[str, Run]]:
    """(our engine, name -> function that runs so many steps)."""
    if speed.restarts < 1:
        raise ValueError(f"restarts is {speed.restarts}; give at least 1")
    organism = zoo.load(speed.organism)
    model, tokenizer = organism.model, organism.tokenizer
    if speed.random_layers is not None:
        if speed.random_layers < 2:
            raise ValueError(f"random_layers is {speed.random_layers}; give at least 2")
        model = of_1b_shape(model, speed.random_layers)
    behaviour = organism.triggers[0][1]
    problem = Problem.from_chat(model, tokenizer, organism.prompts.search[:1], speed.trigger_length)
    engine = Engine(model, problem, batch_size=speed.search_width * speed.restarts)
    gcg = GCG(search_width=speed.search_width, topk=speed.topk)
    source = engine.layers // 4
    theta = random_directions(1, model.config.hidden_size, torch.Generator().manual_seed(0))
    vectors = SteeringVectors(
        theta=theta,
        source_layer=source,
        target_layer=engine.layers,
        radius=1.0,
        method="random",
        model_id=model_id(model),
    )
    target = tokenizer(behaviour, add_special_tokens=False)["input_ids"]
    permitted = problem.permitted(speed.trigger_length)
    gcg.check(permitted)  # nanoGCG has no words for it
    start = random_triggers(permitted, 1, torch.Generator().manual_seed(0))

    def ours(objective: Objective) -> Run:
        def run(steps: int) -> float:
            booked = engine.flops
            settings = replace(gcg, steps=steps, restarts=speed.restarts, initial=start)
            settings(engine, objective, torch.Generator().manual_seed(0))
            return engine.flops - booked

        return run

    def peer(steps: int) -> float:
        run_once(engine, gcg, 0, behaviour, problem.text(start[0].tolist()), steps, 0)
        return steps * flops_per_step(engine, gcg, 0, behaviour)

    return engine, {
        "nanogcg": peer,
        "target-nll": ours(TargetNLL(target_ids=target)),
        "delta-cosine": ours(DeltaCosine.from_vectors(engine, vectors, [engine.layers - speed.layers_skipped])),
    }


def main(speed: Speed) -> None:
    """Measures, prints a table and the ratios, writes speed.json."""
    torch.set_num_threads(speed.threads)
    try:
        engine, runs = contestants(speed)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    # Once without measuring: first calls allocate memory and choose kernels.
    for run in runs.values():
        run(2)
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
    searched = {name: 1 if own is peer else speed.restarts for name, own in measured.items()}
    ratios = {
        name: statistics.median(searched[name] * p.seconds / o.seconds for p, o in zip(peer, own, strict=True))
        for name, own in measured.items()
    }
    shares = {
        name: statistics.median(o.flops / o.seconds / rate for o, rate in zip(own, rates, strict=True))
        for name, own in measured.items()
    }
    beside = "" if speed.restarts == 1 else f" x {speed.restarts} restarts"
    what = speed.organism if speed.random_layers is None else f"1B shape, {speed.random_layers} layers"
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
        share = f"{100 * shares[name]:.0f}"
        table.add_row(name, f"{milliseconds:.0f}", f"{ratios[name]:.2f}", f"{own[0].flops / 1e9:.1f}", share)
    Console().print(table)
    if speed.out is not None:
        speed.out.mkdir(parents=True, exist_ok=True)
        report = {"steps": {name: [o._asdict() for o in own] for name, own in measured.items()}}
        report |= {"median_ratio_to_nanogcg": ratios, "median_share_of_product": shares}
        report |= {"median_share_of_own_products": own_share} | rows.provenance()
        (speed.out / "speed.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Speed))
