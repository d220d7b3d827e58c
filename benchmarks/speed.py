"""Seconds per search step, ours against nanoGCG's, on one organism with equal prompt, width, slot and dtype.

python -m benchmarks.speed
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.table import Table

from attacks.engine import Engine, Objective
from attacks.gcg import GCG
from attacks.nanogcg_peer import run_once
from attacks.objectives import TargetNLL, delta_cosine_from
from attacks.problem import Problem
from attacks.triggers import random_triggers
from benchmarks import rows
from benchmarks.organisms import zoo
from vectors.controls import random_directions
from vectors.steering import SteeringVectors, model_id


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Settings of the comparison; they are the same for every contestant."""

    organism: str = "phrase"
    """whose model and first search prompt are used"""
    search_width: int = 256
    """candidates per step"""
    trigger_length: int = 5
    """tokens in the slot"""
    topk: int = 128
    """tokens considered per position"""
    steps: int = 6
    """steps of one measurement; the difference to a run of one step is timed"""
    repeats: int = 5
    """measurements; the median counts"""
    layers_skipped: int = 1
    """delta cosine reads this many layers before the last"""
    threads: int = 2
    """CPU threads"""
    out: Path | None = None
    """folder for speed.json"""


def step_seconds(run: Callable[[int], None], steps: int) -> float:
    """Seconds per step: a run of `steps` + 1 steps less a run of one, so that set-up is not counted."""
    times = []
    for count in (1, steps + 1):
        began = time.perf_counter()
        run(count)
        times.append(time.perf_counter() - began)
    return (times[1] - times[0]) / steps


def contestants(speed: Speed) -> dict[str, Callable[[int], None]]:
    """Name -> function that runs so many steps."""
    organism = zoo.load(speed.organism)
    model, tokenizer = organism.model, organism.tokenizer
    behaviour = organism.triggers[0][1]
    problem = Problem.from_chat(model, tokenizer, organism.prompts.search[:1], speed.trigger_length)
    engine = Engine(model, problem, batch_size=speed.search_width)
    gcg = GCG(search_width=speed.search_width, topk=speed.topk)
    source = len(model.model.layers) // 4
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

    def ours(objective: Objective) -> Callable[[int], None]:
        def run(steps: int) -> None:
            settings = GCG(steps=steps, search_width=gcg.search_width, topk=gcg.topk, initial=start)
            settings(engine, objective, torch.Generator().manual_seed(0))

        return run

    def peer(steps: int) -> None:
        run_once(engine, gcg, 0, behaviour, problem.text(start[0].tolist()), steps, 0)

    return {
        "nanogcg": peer,
        "target-nll": ours(TargetNLL(target_ids=target)),
        "delta-cosine": ours(delta_cosine_from(engine, vectors, [engine.layers - speed.layers_skipped])),
    }


def main(speed: Speed) -> None:
    """Measures, prints a table and the ratios, writes speed.json."""
    torch.set_num_threads(speed.threads)
    try:
        runs = contestants(speed)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    for run in runs.values():
        run(2)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(speed.repeats):  # in turn, so that a slow minute of the machine hits all alike
        for name, run in runs.items():
            times[name].append(step_seconds(run, speed.steps))
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratios = {
        name: statistics.median(p / t for p, t in zip(times["nanogcg"], times[name], strict=True)) for name in runs
    }
    table = Table(
        "step", "ms (median)", "times as fast as nanoGCG", title=f"{speed.organism}, width {speed.search_width}"
    )
    for name in runs:
        table.add_row(name, f"{1000 * medians[name]:.0f}", f"{ratios[name]:.2f}")
    Console().print(table)
    if speed.out is not None:
        speed.out.mkdir(parents=True, exist_ok=True)
        report = {"step_seconds": times, "median_ratio_to_nanogcg": ratios} | rows.provenance()
        (speed.out / "speed.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Speed))
