"""Recovers a trigger within a budget: goal, search, selection by behaviour on unseen prompts, shrinking, verdict.

The loss never chooses the winner. Whatever the search improves is tried on the `select` prompts, which no search sees.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from attacks.behaviour import success_rate
from attacks.budget import Budget
from attacks.engine import Engine, Objective
from attacks.gcg import GCG
from attacks.goals import Goal, Supervised, Unsupervised
from attacks.objectives import Hybrid, TargetNLL, delta_cosine_from, steered_kl_from
from attacks.problem import SLOT, Problem, Where, encode
from attacks.selection import Selection, TracePoint
from attacks.shrink import delete_one
from attacks.token_ranking import rank_tokens
from attacks.triggers import Found, random_triggers
from attacks.verdict import Verdict, judge

TARGET_TOKENS = 4
"""Tokens of the behaviour in the likelihood objective; success always means the whole behaviour"""
CARRIES = 0.75
"""Share of held-out prompts on which a vector must call its behaviour to be imitated as it is"""
CONTROLS = 8
"""Random strings that a trigger is compared with"""

Build = Callable[[Engine, Goal], Objective]
"""Makes the objective of a goal on the engine's prompts"""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Attack:
    """A recipe: what is known, what is minimised, how it is searched."""

    knowledge: Literal["K0", "K1"]
    """K0: clean prompts only; K1: also the behaviour"""
    objective: Build | None
    """None: the peer brings its own"""
    supervised: Supervised | None = None
    """learns the vector where the objective needs one: in K1, and in K0 if no learned one carries over"""
    unsupervised: Unsupervised = field(default_factory=Unsupervised)
    """learns behaviours in K0"""
    gcg: GCG = GCG(search_width=128, topk=128, patience=15)
    """settings of a round, but for its steps"""
    rounds: tuple[tuple[int, int], ...] = ((3, 8), (12, 60), (8, 40))
    """(tokens in the slot, steps), one round after another until the budget is spent: a short slot can hit the trigger
    itself, a long one finds a way round hard negatives that leave no signal on the trigger's parts"""
    prompts: int = 2
    """search prompts that the loss is averaged over"""
    vector_share: float = 0.35
    """share of the budget for learning behaviours in K0"""
    enough: float = 1.0
    """success rate on the `select` prompts that ends the search; the winner of many does less well on others"""


def _nll(_: Engine, goal: Goal) -> Objective:
    # The first tokens of a behaviour tell it apart, and each further one costs every candidate a token.
    return TargetNLL(target_ids=goal.target_ids[:TARGET_TOKENS])


def _cosine(engine: Engine, goal: Goal) -> Objective:
    assert goal.vectors is not None
    return delta_cosine_from(engine, goal.vectors, [max(1, engine.layers - 1)])


def _kl(engine: Engine, goal: Goal) -> Objective:
    assert goal.vectors is not None
    return steered_kl_from(engine, goal.vectors, engine.layers)


def _hybrid(engine: Engine, goal: Goal) -> Objective:
    return Hybrid(a=_nll(engine, goal), b=_cosine(engine, goal))


ATTACKS: dict[str, Attack] = {
    "target-nll": Attack(knowledge="K1", objective=_nll),
    "delta-cosine": Attack(knowledge="K1", objective=_cosine, supervised=Supervised()),
    "steered-kl": Attack(knowledge="K1", objective=_kl, supervised=Supervised()),
    "hybrid": Attack(knowledge="K1", objective=_hybrid, supervised=Supervised()),
    "unsupervised-nll": Attack(knowledge="K0", objective=_nll),
    "unsupervised-cosine": Attack(knowledge="K0", objective=_cosine, supervised=Supervised()),
    "unsupervised-kl": Attack(knowledge="K0", objective=_kl, supervised=Supervised()),
    "nanogcg": Attack(knowledge="K1", objective=None),
}


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
) -> Recovery:
    """Runs an attack; `search` prompts drive it, `select` prompts choose the winner. Ctrl-C gives the best so far.

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
    longest = max(attack.rounds)[0]
    problem = Problem.from_chat(model, tokenizer, search[: attack.prompts], longest, slot=slot)
    judged = Problem.from_chat(model, tokenizer, select, longest, slot=slot, allowed=problem.allowed)
    engine, select_engine = Engine(model, problem), Engine(model, judged)
    for each in (engine, select_engine):
        # Completions run two tokens beyond the behaviour; the last of them is never read.
        each.check_length(longest, (len(ids) or attack.unsupervised.opening) + 1)
    budget.spent(engine.flops + select_engine.flops)
    clean = [text.replace(SLOT, "").strip() for text in search]
    goals = _goals(model, tokenizer, clean, attack, behaviour, budget, generator)
    trace: list[TracePoint] = []
    selections: list[Selection] = []
    began = budget.share
    for number, goal in enumerate(goals, 1):
        share = budget.part(began + (1.0 - began) * number / len(goals))
        selection = Selection(select_engine, budget, goal, attack.enough, trace)
        selections.append(selection)
        if attack.supervised is not None and (goal.vectors is None or goal.agreement < CARRIES):
            goal = selection.goal = attack.supervised(model, tokenizer, clean, goal, budget, generator)
        try:
            _search(engine, attack, goal, share, selection, generator)
        except KeyboardInterrupt:
            budget.interrupt()
        if selection.asr >= attack.enough or budget.interrupted:
            break
    best = max(selections, key=lambda item: item.asr, default=None)
    return _report(model, tokenizer, select, slot, judged, best, budget, trace, engine.steps, generator)


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


def _search(
    engine: Engine, attack: Attack, goal: Goal, budget: Budget, selection: Selection, generator: torch.Generator
) -> None:
    """Whole-vocabulary ranking of single tokens, then rounds of GCG at one slot length after another."""
    if attack.objective is None:
        # The peer is an optional dependency.
        from attacks import nanogcg_peer

        return nanogcg_peer.search(engine, attack.gcg, attack.rounds, goal.behaviour, generator, budget, selection)
    single = _rank(engine, attack.objective, goal, budget)
    if any([selection(found) for found in single[:8]]):
        return
    objective = attack.objective(engine, goal)
    for number in itertools.count():
        length, steps = attack.rounds[number % len(attack.rounds)]
        engine.problem = engine.problem.resized(length)
        replace(attack.gcg, steps=steps)(engine, objective, generator, budget, selection)
        if budget.exhausted or selection.asr >= selection.enough:
            return


def _rank(engine: Engine, build: Build, goal: Goal, budget: Budget) -> list[Found]:
    """Every allowed token by itself on one prompt, within an eighth of the budget."""
    probe = Engine(engine.model, engine.problem.take([0]))
    objective = build(probe, replace(goal, target_ids=goal.target_ids[:2]))
    return rank_tokens(probe, objective, torch.zeros(1, dtype=torch.long), 0, budget=budget.part(budget.share + 0.12))


def _report(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
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
            necessary=(), verdict="none", trace=trace, seconds=budget.elapsed, flops=budget.used, steps=steps,
            interrupted=budget.interrupted, vector={},
        )  # fmt: skip
    shrunk = delete_one(best.best.trigger_ids, lambda ids: best.rate(judged.encode(judged.text(ids))))
    ids = judged.encode(judged.text(shrunk.trigger_ids))
    behaviour = best.goal.behaviour
    controls = random_triggers(judged.permitted(len(ids)), CONTROLS, generator).tolist()
    rates = success_rate(model, tokenizer, [ids, [], *controls], select, behaviour, slot=slot).tolist()
    asr, clean, noise = rates[0], rates[1], sum(rates[2:]) / CONTROLS
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
        necessary=shrunk.necessary, verdict=judge(rate=asr, rate_without=clean, rate_noise=noise, found=text),
        trace=trace, seconds=budget.elapsed, flops=budget.used, steps=steps,
        interrupted=budget.interrupted, vector=vector,
    )  # fmt: skip
