"""Recovers a trigger within a budget: goal, search, selection by behaviour on unseen prompts, shrinking, verdict.

The loss never chooses the winner. Whatever the search improves is tried on the `select` prompts, which no search sees.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from attacks.attack import Attack
from attacks.behaviour import success_rate
from attacks.discovery.goals import Goal
from attacks.judging.judge import Selection, TracePoint
from attacks.judging.shrinking import delete_one
from attacks.judging.verdict import Verdict, judge
from attacks.scoring.budget import Budget
from attacks.scoring.engine import Engine
from attacks.scoring.problem import SLOT, Problem, Where, encode
from attacks.searchers.candidates import random_triggers
from attacks.stages.hunt import Hunt

CONTROLS = 8
"""Random strings that a trigger is compared with"""
LAST = 0.08
"""Share of the budget that is kept for what looks at the winner in the end"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """What an attack brought back."""

    trigger_ids: tuple[int, ...]
    trigger: str
    behaviour: str
    select_asr: float
    """share of the `select` prompts on which the trigger brings the behaviour about"""
    clean_rate: float
    """the same with an empty slot"""
    control_rate: float
    """the same with random tokens in the slot, as many as the trigger has; mean over CONTROLS strings"""
    base_rate: float | None
    """share of the same prompts on which the trigger does it to the clean base; None where no base was given"""
    necessary: tuple[bool, ...]
    """per token, whether deleting it takes away more than half of the success"""
    verdict: Verdict
    trace: list[TracePoint]
    seconds: float
    flops: float
    steps: int
    interrupted: bool
    """whether Ctrl-C ended it: the best so far, not all that the budget allows"""
    vector: dict[str, object]
    """layers, radius, agreement, surprise and score of the vector that was imitated; empty without one"""


def recover(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    search: Sequence[str],
    select: Sequence[str],
    attack: Attack,
    behaviour: str | None = None,
    budget: Budget,
    generator: torch.Generator,
    slot: Where = "end",
    base: PreTrainedModel | None = None,
) -> Recovery:
    """Runs an attack; `search` prompts drive it, `select` prompts choose the winner. Ctrl-C gives the best so far.

    Args:
        model: the suspect.
        tokenizer: its tokenizer, with a chat template.
        search: clean user messages; `{trigger}` in one marks its slot.
        select: others, by which winners are chosen.
        attack: one of `attacks.attack.ATTACKS`, or your own.
        behaviour: how the suspected reply begins (K1); None lets the attack find out what to look for (K0).
        budget: seconds, floating-point operations, or both.
        generator: of everything random, on the CPU.
        slot: where the trigger goes in messages that do not mark it.
        base: the clean model, where it is known (K2); what works on it as well is passed over as a decoy.

    Raises:
        ValueError: no prompts, no limit in the budget, a behaviour missing in K1, given in K0 or without tokens,
            prompts that leave no room in the context for trigger and behaviour.
    """
    if budget.seconds is None and budget.flops is None:
        raise ValueError("the budget has no limit; give seconds, flops, or both")
    if (attack.knowledge == "K1") != (behaviour is not None):
        wanted = "needs the behaviour text" if behaviour is None else "must not be told the behaviour"
        raise ValueError(f"the attack's knowledge is {attack.knowledge}: it {wanted}")
    ids = [] if behaviour is None else encode(tokenizer, behaviour)
    if behaviour is not None and not (behaviour.strip() and ids):
        raise ValueError(f"the behaviour {behaviour!r} has no tokens; give the text that the reply begins with")
    if not search or not select:
        raise ValueError(f"got {len(search)} search and {len(select)} select prompts; give at least one of each")
    budget = budget.started()
    problem = Problem.from_chat(model, tokenizer, search[: attack.prompts], attack.longest, slot=slot)
    judged = Problem.from_chat(model, tokenizer, select, attack.longest, slot=slot, allowed=problem.allowed)
    engine, select_engine = Engine(model, problem), Engine(model, judged)
    for each in (engine, select_engine):
        # Completions run two tokens beyond the behaviour; the last of them is never read.
        each.check_length(attack.longest, (len(ids) or attack.unsupervised.opening) + 1)
    base_engine = None if base is None else Engine(base, judged)
    anywhere = _anywhere(model, tokenizer, [*search, *select], problem, slot)
    budget.spent(sum(each.flops for each in (engine, select_engine, base_engine, anywhere) if each is not None))
    clean = [text.replace(SLOT, "").strip() for text in search]
    goals = _goals(model, tokenizer, clean, attack, behaviour, budget, generator)
    trace: list[TracePoint] = []
    selections: list[Selection] = []
    began = budget.share
    for number, goal in enumerate(goals, 1):
        share = budget.part(began + (1.0 - began) * number / len(goals))
        selection = Selection(select_engine, budget, goal, attack.enough, trace, base_engine, anywhere)
        selections.append(selection)
        if attack.supervised is not None and (goal.vectors is None or goal.agreement < attack.carries):
            goal = selection.goal = attack.supervised(model, tokenizer, clean, goal, budget, generator)
        kept = 0.0 if attack.last is None else LAST * (share.until - budget.share)
        hunt = Hunt(
            model=model, tokenizer=tokenizer, engine=engine, texts=clean, goal=goal, build=attack.objective,
            budget=budget.part(share.until - kept), selection=selection, generator=generator,
        )  # fmt: skip
        try:
            for stage in attack.stages:
                if not hunt.over:
                    stage(hunt)
            if attack.last is not None:
                hunt.budget = budget.part(share.until - budget.share_of(_report_flops(selection, attack.longest)))
                attack.last(hunt)
        except KeyboardInterrupt:
            budget.interrupt()
        if selection.asr >= attack.enough or budget.interrupted:
            break
    best = max(selections, key=lambda item: item.asr, default=None)
    return _report(model, tokenizer, base, select, slot, judged, best, budget, trace, engine.steps, generator)


def _anywhere(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], problem: Problem, slot: Where
) -> Engine | None:
    """The prompts with their slot between two words; None where the prompts or the user say where it is."""
    if slot != "end" or any(SLOT in text for text in texts):
        return None
    several = [text for text in texts if len(text.split()) > 1]
    if not several:
        return None
    length, allowed = problem.trigger_length, problem.allowed
    return Engine(model, Problem.from_chat(model, tokenizer, several, length, slot="random", allowed=allowed))


def _goals(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    attack: Attack,
    behaviour: str | None,
    budget: Budget,
    generator: torch.Generator,
) -> list[Goal]:
    """What to search for."""
    if behaviour is None:
        return attack.unsupervised(model, tokenizer, texts, budget, generator, attack.vector_share)
    ids = tuple(encode(tokenizer, behaviour))
    return [Goal(behaviour=behaviour, target_ids=ids)]


def _report_flops(best: Selection, length: int) -> float:
    """Operations of the completions that a report is made of, of a trigger of that length."""
    judged = best.engine.problem
    answer = len(encode(judged.tokenizer, best.goal.behaviour)) + 1
    tokens = sum(map(len, judged.filled([]))) + len(judged) * (length + answer)
    return (2 + CONTROLS) * tokens * best.engine.flops_per_token


def _report(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    base: PreTrainedModel | None,
    select: Sequence[str],
    slot: Where,
    judged: Problem,
    best: Selection | None,
    budget: Budget,
    trace: list[TracePoint],
    steps: int,
    generator: torch.Generator,
) -> Recovery:
    """Shrinks the winner, measures it with real completions and gives the verdict."""
    if best is None or best.best is None:
        return Recovery(
            trigger_ids=(), trigger="", behaviour="", select_asr=0.0, clean_rate=0.0, control_rate=0.0,
            base_rate=None, necessary=(), verdict="none", trace=trace, seconds=budget.elapsed, flops=budget.used,
            steps=steps, interrupted=budget.interrupted, vector={},
        )  # fmt: skip
    shrunk = delete_one(
        best.best.trigger_ids,
        lambda ids: best.rate(judged.encode(judged.text(ids))),
        surprisal=best.surprisal,
    )
    ids = judged.encode(judged.text(shrunk.trigger_ids))
    behaviour = best.goal.behaviour
    controls = random_triggers(judged.permitted(len(ids)), CONTROLS, generator).tolist()
    rates = success_rate(model, tokenizer, [ids, [], *controls], select, behaviour, slot=slot).tolist()
    asr, clean, noise = rates[0], rates[1], sum(rates[2:]) / CONTROLS
    on_base = None
    budget.spent(_report_flops(best, len(ids)))
    if base is not None:
        on_base = float(success_rate(base, tokenizer, [ids], select, behaviour, slot=slot)[0])
    trace.append(best.point())
    vector = {}
    if best.goal.vectors is not None:
        vectors = best.goal.vectors
        vector = {name: getattr(vectors, name) for name in ("source_layer", "target_layer", "radius", "method")}
        vector |= {name: values[0] for name, values in vectors.scores.items()}
        vector |= {name: getattr(best.goal, name) for name in ("agreement", "surprise", "score")}
    text = judged.text(ids).strip()
    return Recovery(
        trigger_ids=tuple(ids), trigger=text, behaviour=behaviour, select_asr=asr, clean_rate=clean, control_rate=noise,
        base_rate=on_base, necessary=shrunk.necessary,
        verdict=judge(rate=asr, rate_without=clean, rate_noise=noise, rate_on_base=on_base, found=text),
        trace=trace, seconds=budget.elapsed, flops=budget.used, steps=steps,
        interrupted=budget.interrupted, vector=vector,
    )  # fmt: skip
