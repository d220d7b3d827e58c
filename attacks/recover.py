"""Recovers the trigger of a suspect within a budget, on one page: goals, hunt, judge, finding.

A suspect model, clean prompts and a budget come in; a `Recovery` with its verdict goes out. In between:

1. A goal is a behaviour, which the user gives or which is discovered from steering vectors. A behaviour may be given as
   a predicate on replies; the text to search for is then taken from the vector whose completions show it most often.
2. A hunt runs the stages of an attack for one goal. The stages use the `search` prompts only.
3. The judge measures every trigger that a stage proposes on the `select` prompts. The winner is chosen by its success
   there, never by the loss of the search.
4. The report shrinks the winner, measures it with real completions and gives it a verdict.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from itertools import islice

import torch

from attacks.attack import Attack
from attacks.behaviour import Behaviour
from attacks.discovery.goal import Goal
from attacks.discovery.screening import screened
from attacks.judging.judge import Judge
from attacks.judging.recovery import Recovery
from attacks.judging.report import report
from attacks.judging.report_cost import TELLING, check_affordable, latest_end, measure_again, report_share, search_end
from attacks.preparation import given_goal, judge_of
from attacks.scoring.budget import Budget
from attacks.scoring.slot_markers import SLOT, without_slot
from attacks.stages.hunt import Hunt
from attacks.suspect import Suspect


def recover(
    suspect: Suspect,
    attack: Attack,
    *,
    search: Sequence[str],
    select: Sequence[str],
    behaviour: str | Behaviour | None = None,
    budget: Budget,
    generator: torch.Generator,
) -> Recovery:
    """Runs an attack; Ctrl-C at any moment ends it and gives the best so far.

    Args:
        suspect: the model under audit.
        attack: one of `attacks.attack.ATTACKS`, or your own.
        search: clean user messages that drive the search; `{trigger}` in one marks its slot.
        select: other clean messages, on which winners are chosen.
        behaviour: how the suspected reply begins, or a predicate on replies (K1); None lets the attack find out what to
            look for (K0).
        budget: seconds, floating-point operations, or both.
        generator: draws whatever is random, on the CPU.

    Raises:
        ValueError: no prompts, no limit in the budget, a budget that the report alone would exceed, a behaviour without
            tokens, a model that overflows on these prompts, or prompts that leave no room in the context for trigger
            and behaviour.
    """
    given = given_goal(suspect, search, select, behaviour, budget)
    budget, judges, reached = budget.started(), list[Judge](), 0
    engine = suspect.engine(search[: attack.prompts], attack.longest)
    open_judge = judge_of(suspect, attack, engine, search, select, budget, given)
    check_affordable(open_judge, attack.longest, attack.unsupervised.opening)
    texts, left_out, no_room = without_slot(search), (), list[str]()
    try:
        discover = partial(_goals, attack, suspect, given, texts, open_judge, generator)
        with nullcontext() if given.target_ids else open_judge.accounting("discovery"):
            goals, left_out = attack.journal.goals(open_judge, generator, discover)
        began = budget.share
        for number, goal in enumerate(goals, 1):
            # Each goal may use an equal part of what discovery left, and what earlier goals did not use.
            share = budget.part(began + (1.0 - began) * number / len(goals))
            judge = open_judge.of(goal)
            judges.append(judge)
            goal = judge.goal = _with_vector(attack, suspect, texts, judge, generator, share)
            measure_again(judge)
            end = search_end(judge, attack.longest, budget.share, share.until)
            hunt = Hunt(
                suspect=suspect, engine=engine, texts=texts, goal=goal, build=attack.objective, judge=judge,
                budget=budget.part(end), generator=generator,
                marked=any(SLOT in text for text in search), no_room=no_room,
            )  # fmt: skip
            reached = max(reached, attack.run(hunt))
            _improve(attack, hunt, share.until)
            if judge.works or budget.interrupted:
                break
    except KeyboardInterrupt:
        budget.interrupt()
    best = max(judges, key=lambda judge: judge.asr, default=None)
    not_reached = left_out + (tuple(type(stage).__name__ for stage in attack.stages[reached:]) if judges else ())
    return report(best or open_judge, not_reached, no_room, steps=engine.steps, generator=generator)


def _goals(
    attack: Attack, suspect: Suspect, given: Goal, texts: list[str], judge: Judge, generator: torch.Generator
) -> tuple[list[Goal], tuple[str, ...]]:
    """(what to search for: the given behaviour, or what is discovered; names of what the budget cut short)."""
    if given.target_ids:
        return [given], ()
    budget = judge.budget.part(latest_end(judge, attack.longest, attack.unsupervised.opening))
    compare = attack.contrasted
    contrasted = iter(()) if compare is None else compare(suspect, texts, budget, generator, given.shows)
    # Where the model is too large for all vectors, the comparison with the base is the better bet.
    first = 1 if attack.unsupervised.all_fit(suspect, texts, budget, attack.vector_share) else None
    for goals in islice(contrasted, first):
        if goals:
            return goals, ()
    # Vectors are learned within the same part of what the comparison has left.
    share = budget.share + attack.vector_share * (1.0 - budget.share)
    if given.shows is None:
        goals, left_out = attack.unsupervised(suspect, texts, budget, generator, share)
    else:
        goals, left_out = screened(attack.unsupervised, suspect, texts, given, budget, generator, share)
    # Where they show nothing, there is nothing to search for but what the comparison may still find.
    return goals or next(contrasted, []), left_out


def _with_vector(
    attack: Attack, suspect: Suspect, texts: list[str], judge: Judge, generator: torch.Generator, share: Budget
) -> Goal:
    """The judge's goal, with a supervised vector where the attack learns one and the goal's own is missing or weak."""
    goal = judge.goal
    # A vector that a predicate chose shows more of the behaviour than one learned for a single opening of it.
    weak = goal.vectors is None or (goal.shows is None and goal.agreement < attack.carries)
    if attack.supervised is None or not weak:
        return goal
    learn = partial(attack.supervised, suspect, texts, goal, generator, share)
    with judge.accounting("supervised vector"):
        (goal,), _ = attack.journal.goals(judge, generator, lambda: ([learn()], ()))
    return goal


def _improve(attack: Attack, hunt: Hunt, until: float) -> None:
    """Runs the attack's last stages until that share of the budget, except for what the report needs.

    Unless a weakened suspect tells them apart, no more goes into bettering a trigger than went into finding it: on a
    large model these stages alone would spend whatever is left.
    """
    measure_again(hunt.judge)
    share, told_apart = hunt.judge.budget.share, hunt.judge.handicap is not None
    end = min(until - report_share(hunt.judge, attack.longest), latest_end(hunt.judge, attack.longest))
    hunt.budget = hunt.judge.budget.part(end - TELLING if told_apart else min(2 * share, end))
    # These would rank a first batch although nothing is left to spend.
    weakened = attack.weakened if told_apart and not hunt.budget.exhausted else ()
    for stage in (*weakened, *attack.last):
        with hunt.judge.accounting(type(stage).__name__):
            attack.journal.stage(hunt, stage)
