"""The report: the best trigger is shrunk, measured with real completions on the `select` prompts, and gets a verdict.

It is compared with three controls on the same prompts: an empty slot, random tokens in the slot, and the clean base
where that is known. Completions cost more than teacher-forced measurements, but they are what a user sees.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from attacks.behaviour import echoes, success_rate
from attacks.judging.handicap import surest
from attacks.judging.judge import Judge
from attacks.judging.recovery import Recovery
from attacks.judging.report_cost import CONTROLS, TELLING, measure_again, report_share, room_to_tell
from attacks.judging.shrinking import SLACK, Shrunk, delete_one, drop_letters
from attacks.judging.verdict import ABSENT, WORKS, Verdict, judge_trigger
from attacks.searchers.candidates import random_triggers
from attacks.searchers.words import is_word, naming


def report(
    judge: Judge, not_reached: tuple[str, ...], no_room: list[str], *, steps: int, generator: torch.Generator
) -> Recovery:
    """Measures the judge's best trigger; where the report itself is interrupted, what is known by then, unfinished."""
    measured: dict[str, Any] = {"select_asr": judge.asr, "clean_rate": 0.0, "control_rate": 0.0, "base_rate": None}
    measured["necessary"] = measured["without"] = ()
    ids: tuple[int, ...] = () if judge.best is None else judge.best.trigger_ids
    # What stands here is reported where the measurements below are interrupted, and where nothing was searched for
    # because no vector shows what a predicate describes: that is no answer at all.
    nothing = judge.best is None and not (judge.goal.shows and not judge.goal.target_ids)
    verdict: Verdict = "none" if nothing else "unfinished"
    try:
        if judge.best is not None:
            with judge.accounting("report"):
                ids, measured = _measured(judge, generator)
            verdict = judge_trigger(
                rate=measured["select_asr"],
                rate_without=measured["clean_rate"],
                rate_noise=measured["control_rate"],
                rate_on_base=measured["base_rate"],
                found=judge.engine.problem.text(ids).strip(),
            )
            judge.trace.append(judge.point())
    except KeyboardInterrupt:
        judge.budget.interrupt()
    return Recovery(
        trigger_ids=ids,
        trigger=judge.engine.problem.text(ids).strip(),
        behaviour=judge.goal.behaviour,
        predicate=str(judge.goal.shows or ""),
        verdict=verdict,
        trace=judge.trace,
        seconds=judge.budget.elapsed,
        flops=judge.budget.used,
        steps=steps,
        interrupted=judge.budget.interrupted,
        not_reached=not_reached,
        no_room=tuple(dict.fromkeys(no_room)),
        vector=_vector(judge) if judge.best is not None else {},
        vectors=judge.goal.vectors if judge.best is not None else None,
        family=judge.family(ids),
        by_stage=judge.by_stage,
        **measured,
    )


def _measured(judge: Judge, generator: torch.Generator) -> tuple[tuple[int, ...], dict[str, Any]]:
    """(shrunk trigger as a user would type it, its rates by real completions)."""
    problem, suspect = judge.engine.problem, judge.suspect
    # Shrinking must leave what the completions below cost, or an interrupt would end the report without a verdict.
    measure_again(judge)
    reserve = report_share(judge, len(judge.best.trigger_ids) if judge.best else 0)
    shrunk = _shrunk(judge, 1.0 - reserve)
    # A user types text: ids that would be encoded otherwise are measured as the user's ids.
    ids = tuple(problem.encode(problem.text(shrunk.trigger_ids)))
    behaviour, answer = judge.goal.predicate, judge.goal.answer_tokens

    def rate(trigger: tuple[int, ...], *, on_base: bool = False) -> float:
        model = suspect.base if on_base and suspect.base is not None else suspect.model
        return success_rate(model, problem, trigger, behaviour, max_new_tokens=answer)

    # Of the same length as the trigger, since long random strings elicit some planted behaviours by themselves.
    controls = random_triggers(problem.permitted(len(ids)), CONTROLS, generator).tolist()
    return ids, {
        "select_asr": rate(ids),
        "clean_rate": rate(()),
        "control_rate": sum(rate(tuple(control)) for control in controls) / CONTROLS,
        "base_rate": rate(ids, on_base=True) if suspect.base is not None else None,
        "necessary": shrunk.necessary,
        "without": shrunk.without,
    }


def _shrunk(judge: Judge, until: float) -> Shrunk:
    """The best trigger without the tokens and letters that it does not need, up to that share of the budget."""
    assert judge.best is not None
    problem = judge.engine.problem
    told_apart = judge.handicap is not None
    early = until - TELLING if told_apart else until
    shrunk = judge.shrunk(by_text=True, until=early)
    assert shrunk is not None
    text = problem.text(shrunk.trigger_ids).strip()
    better = of_shorter_words(judge, text if told_apart else of_words_that_work(judge, text, early), early)
    if told_apart and not judge.budget.stopped:
        better = of_texts_that_work(judge, better, until)
    if better == text:
        return shrunk
    judge.best = judge.best._replace(trigger_ids=tuple(problem.encode(better)))
    chosen = told_apart or len(better.split()) == 1  # among words: a part that fires as often is another word, or none
    if chosen and all(map(is_word, better.split())):
        rate = partial(_rate_of_text, judge)
        return delete_one(problem.encode(better), rate, surprisal=lambda _: 0.0, stop=_stop_at(judge, until))
    again = judge.shrunk(by_text=True, until=until)
    assert again is not None
    return again


def of_words_that_work(judge: Judge, text: str, until: float = 1.0) -> str:
    """Of a word and others that were tried and work, the one of minimum description length; several words stay.

    The judge prefers words that are likely in their place. But a rare one may be planted like any other, so that no
    text need take more nats than naming it does. Nothing is compared once that share of the budget is spent.
    """
    if judge.goal.shows is not None or len(text.split()) != 1 or _stop_at(judge, until)():
        return text
    problem, empty = (judge.anywhere or judge.engine).problem, judge.surprisal(())

    def length(word: str) -> float:
        ids = problem.encode(word)
        return len(problem) * judge.nats(ids) + min(judge.surprisal(ids), empty + naming(word, problem))

    # Of those that the search measured: the report has room for no more.
    words = [each.trigger for each in judge.family() if each.nats is not None and is_word(each.trigger)]
    return min(_as_often(judge, text, words), key=length)


def of_texts_that_work(judge: Judge, text: str, until: float) -> str:
    """Of a text and those that were tried and work, the likeliest to be planted, as a weakened suspect tells.

    As many of them as there is room for until that share of the budget.
    """
    assert judge.handicap is not None
    problem = (judge.anywhere or judge.engine).problem
    texts = _as_often(judge, text, [relative.trigger for relative in judge.family()])
    count, prompts = room_to_tell(judge, texts, until)
    if count < 2:
        return text
    ids = [problem.encode(each) for each in texts[:count]]
    return problem.text(surest(judge.handicap, ids, problem, prompts, _stop_at(judge, until))).strip()


def _as_often(judge: Judge, text: str, others: Sequence[str]) -> list[str]:
    """The text, and of the others those that are findings too and work as often."""
    least = max(WORKS, _rate_of_finding(judge, text) - SLACK)
    return [text, *(each for each in others if each != text and _rate_of_finding(judge, each) >= least)]


def _rate_of_text(judge: Judge, trigger_ids: Sequence[int]) -> float:
    """Success rate of what these tokens are when a user types them."""
    problem = judge.engine.problem
    return judge.rate(problem.encode(problem.text(trigger_ids)))


def of_shorter_words(judge: Judge, text: str, until: float = 1.0) -> str:
    """A trigger with shorter words where these are likelier to be planted (see `drop_letters`).

    Text that is not all words stays as it is. So does any under a predicate, which has no text whose nats could tell.
    """
    encode, goal, handicap = judge.engine.problem.encode, judge.goal, judge.handicap
    if goal.shows is not None or not all(map(is_word, text.split())):
        return text
    nats, count = judge.nats if handicap is None else handicap.nats, len((judge.anywhere or judge.engine).problem)
    return drop_letters(
        text,
        partial(_rate_of_finding, judge),
        lambda text: count * nats(encode(text)),
        stop=_stop_at(judge, until),
    )


def _rate_of_finding(judge: Judge, text: str) -> float:
    """Success rate of a text, in [0, 1]; 0 of one that works on the clean base as well, or quotes the behaviour."""
    ids = judge.engine.problem.encode(text)
    on_base = judge.base_engine is not None and judge.rate(ids, on_base=True) > ABSENT
    return 0.0 if on_base or echoes(text, judge.goal.behaviour) else judge.rate(ids)


def _stop_at(judge: Judge, until: float) -> Callable[[], bool]:
    """Whether measuring has to stop: at an interrupt, or once that share of the budget is spent."""
    return lambda: judge.budget.stopped or judge.budget.share >= until


def _vector(judge: Judge) -> dict[str, object]:
    """What is worth knowing of the vector that was imitated."""
    vectors = judge.goal.vectors
    if vectors is None:
        return {}
    found: dict[str, object] = {
        name: getattr(vectors, name) for name in ("source_layer", "target_layer", "radius", "method")
    }
    found |= {name: values[0] for name, values in vectors.scores.items()}
    return found | {name: getattr(judge.goal, name) for name in ("agreement", "surprise", "score")}
