"""Recovers the trigger of a suspect within a budget, on one page: goals, hunt, judge, finding.

A suspect model, clean prompts and a budget come in; a `Recovery` with its verdict goes out. In between:

1. A goal is a behaviour, which the user gives or which is discovered from steering vectors. A behaviour may be given as
   a predicate on replies; the text to search for is then taken from the vector whose completions show it most often.
2. A hunt runs the stages of an attack for one goal. The stages use the `search` prompts only.
3. The judge measures every trigger that a stage proposes on the `select` prompts. The winner is chosen by its success
   there, never by the loss of the search.
4. The report shrinks the winner, measures it with real completions and gives it a verdict.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch

from attacks.attack import Attack
from attacks.behaviour import Behaviour, FixedOpening
from attacks.discovery.goal import ANSWER, Goal
from attacks.discovery.screening import screened
from attacks.judging.judge import Judge
from attacks.judging.report import Recovery, report
from attacks.judging.report_cost import check_affordable, measure_again, report_share, search_end
from attacks.scoring.budget import Budget
from attacks.scoring.engine import Engine
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
            tokens, or prompts that leave no room in the context for trigger and behaviour.
    """
    given = _check(suspect, search, select, behaviour, budget)
    budget, judges, reached = budget.started(), list[Judge](), 0
    engine = suspect.engine(search[: attack.prompts], attack.longest)
    open_judge = _judge_of(suspect, attack, engine, search, select, budget, given)
    check_affordable(open_judge, attack.longest, attack.unsupervised.opening)
    texts, left_out = without_slot(search), ()
    try:
        discover = partial(_goals, attack, suspect, given, texts, budget, generator)
        with open_judge.accounting("discovery"):
            goals, left_out = attack.journal.goals(open_judge, generator, discover)
        began = budget.share
        for number, goal in enumerate(goals, 1):
            # Each goal may use an equal part of what discovery left, and what earlier goals did not use.
            share = budget.part(began + (1.0 - began) * number / len(goals))
            judge = open_judge.of(goal)
            judges.append(judge)
            # A vector that a predicate chose shows more of the behaviour than one learned for a single opening of it.
            weak = goal.vectors is None or (goal.shows is None and goal.agreement < attack.carries)
            if attack.supervised is not None and weak:
                learn = partial(attack.supervised, suspect, texts, goal, generator, share)
                with judge.accounting("supervised vector"):
                    goal = judge.goal = _kept(attack, judge, generator, learn)
            measure_again(judge)
            end = search_end(judge, attack.longest, budget.share, share.until)
            hunt = Hunt(
                suspect=suspect, engine=engine, texts=texts, goal=goal, build=attack.objective, judge=judge,
                budget=budget.part(end), generator=generator,
                marked=any(SLOT in text for text in search),
            )  # fmt: skip
            reached = max(reached, attack.run(hunt))
            _improve(attack, hunt, share.until)
            if judge.works or budget.interrupted:
                break
    except KeyboardInterrupt:
        budget.interrupt()
    best = max(judges, key=lambda judge: judge.asr, default=None)
    not_reached = left_out + (tuple(type(stage).__name__ for stage in attack.stages[reached:]) if judges else ())
    return report(best or open_judge, not_reached=not_reached, steps=engine.steps, generator=generator)


def _goals(
    attack: Attack, suspect: Suspect, given: Goal, texts: list[str], budget: Budget, generator: torch.Generator
) -> tuple[list[Goal], tuple[str, ...]]:
    """(what to search for: the given behaviour, or what is discovered; names of what the budget cut short)."""
    if given.target_ids:
        return [given], ()
    if given.shows is None:
        share = attack.vector_share
        if attack.contrasted is not None and suspect.comparable is not None:
            if goals := attack.contrasted(suspect, texts, budget, generator):
                return goals, ()
            # Vectors are learned within the same part of what the comparison with the base has left.
            share = budget.share + share * (1.0 - budget.share)
        return attack.unsupervised(suspect, texts, budget, generator, share)
    return screened(attack.unsupervised, suspect, texts, given, budget, generator, attack.vector_share)


def _kept(attack: Attack, judge: Judge, generator: torch.Generator, learn: Callable[[], Goal]) -> Goal:
    """The judge's goal with a vector, which `learn` makes unless the attack's journal has it."""
    (goal,), _ = attack.journal.goals(judge, generator, lambda: ([learn()], ()))
    return goal


def _improve(attack: Attack, hunt: Hunt, until: float) -> None:
    """Runs the attack's last stages until that share of the budget, except for what the report needs.

    No more goes into bettering a trigger than went into finding it: on a large model these stages alone would spend
    whatever is left.
    """
    measure_again(hunt.judge)
    share = hunt.judge.budget.share
    hunt.budget = hunt.judge.budget.part(min(2 * share, until - report_share(hunt.judge, attack.longest)))
    for stage in attack.last:
        with hunt.judge.accounting(type(stage).__name__):
            attack.journal.stage(hunt, stage)


def _check(
    suspect: Suspect, search: Sequence[str], select: Sequence[str], behaviour: str | Behaviour | None, budget: Budget
) -> Goal:
    """The given behaviour, without tokens where they are to be discovered; raises ValueError for what cannot be run."""
    if budget.seconds is None and budget.flops is None:
        raise ValueError("the budget has no limit; give seconds, flops, or both")
    if not search or not select:
        raise ValueError(f"got {len(search)} search and {len(select)} select prompts; give at least one of each")
    if behaviour is None:
        return Goal(behaviour="", target_ids=())
    shows = FixedOpening(behaviour) if isinstance(behaviour, str) else behaviour
    text, predicate = shows.text, None if isinstance(shows, FixedOpening) else shows
    if text is None:
        return Goal(behaviour="", target_ids=(), shows=predicate)
    ids = suspect.target_ids(text, search)
    if not ids:
        raise ValueError(f"the behaviour {text!r} has no tokens; give the text that the reply begins with")
    return Goal(behaviour=text, target_ids=ids, shows=predicate)


def _judge_of(
    suspect: Suspect,
    attack: Attack,
    engine: Engine,
    search: Sequence[str],
    select: Sequence[str],
    budget: Budget,
    given: Goal,
) -> Judge:
    """The judge on the `select` prompts; what was given of the goal may lack its tokens.

    Raises:
        ValueError: prompts of the search or of the judge that leave no room for a trigger and the behaviour.
    """
    target_length = len(given.target_ids) or attack.unsupervised.opening
    if given.shows is not None:
        target_length = max(target_length, ANSWER)
    # The tokens that search prompts permit: what the search may propose is what the judge can take in.
    own = suspect.engine(select, attack.longest, allowed=engine.problem.allowed)
    for each in (engine, own):
        # Completions run two tokens beyond the behaviour; the last of them is never read.
        each.check_length(attack.longest, target_length + 1)
    return Judge(
        suspect=suspect,
        engine=own,
        base_engine=None if suspect.base is None else Engine(suspect.base, own.problem),
        anywhere=suspect.engine_of_random_places([*search, *select], engine),
        goal=given,
        enough=attack.enough,
        budget=budget,
        trace=[],
    )
