"""What the report on a trigger costs, known before the search: a budget that cannot hold it is refused.

The report completes every `select` prompt with the trigger, without it, with random tokens in its place, and on the
clean base. Its operations are computed. Its seconds are measured on a few of these completions, because a completion,
token by token, is slower than the batches of a search.
"""

import time

from transformers import PreTrainedModel

from attacks.discovery.goal import ANSWER, BEYOND
from attacks.judging.handicap import CALIBRATED, FEW, HALVINGS, PROMPTS, RANDOM
from attacks.judging.judge import Judge
from attacks.scoring.planning import completion_flops, forward_flops, head_flops
from attacks.scoring.problem import Problem
from vectors.generate import greedy
from vectors.prompts import Prompts

CONTROLS = 8
"""Random strings that a trigger is compared with."""
REPORT = 0.08
"""Share of each goal's budget, in [0, 1], that is kept back for the last stage and for shrinking the winner. What the
report's own completions cost is kept back besides."""
TELLING = 0.04
"""Share of the budget, in [0, 1], kept back for telling texts that all work apart, where a weakened suspect does."""
FEWEST_TOLD = 8
"""Prompts on which this is done at least; where the budget has no room for them, fewer texts are told apart, and none
where there are not as many."""
TIGHT = 0.5
"""A budget of operations is tight if the report takes a larger share of it, in [0, 1]; one of seconds is in any case.
In any other the search may use a little more than the report leaves, up to `OVERDRAFT`."""
OVERDRAFT = 0.05
"""Share of the budget, in [0, 1], by which the report may exceed it."""
CLEAR = 0.1
"""A report that surely takes less than this share of the seconds, in [0, 1], is not measured more exactly."""

PACE = 4
"""Tokens of the completion whose time tells how busy the machine is."""
DRIFT = 0.1
"""Share of the budget, in [0, 1], that passes before this is looked at again."""


def report_share(judge: Judge, length: int) -> float:
    """Share of the budget that the report on a trigger of so many tokens will take."""
    budget, model, problem = judge.budget, judge.suspect.model, judge.engine.problem
    answer, exact = judge.goal.answer_tokens, _exact_share(judge, length)
    if budget.seconds is not None or exact > TIGHT:
        return exact
    # Without padding and base, as when runs were recorded: with the same operations, seeds give the same results.
    return budget.share_of((2 + CONTROLS) * completion_flops(model, problem, length, answer))


def latest_end(judge: Judge, length: int, opening: int = 0) -> float:
    """Share of the budget at which all must have ended but the report on a trigger of so many tokens.

    The whole then exceeds the budget by `OVERDRAFT` at most. `opening` is as for `check_affordable`.
    """
    return 1.0 + OVERDRAFT - _exact_share(judge, length, opening)


def _exact_share(judge: Judge, length: int, opening: int = 0) -> float:
    """Share of the budget that the completions of the report will take, padding and base included."""
    answer = _answer(judge, opening)
    flops = padded_flops(judge.suspect.model, judge.engine.problem, length, answer)
    # Under a predicate a trial takes as long as one of these completions, and one that has begun is finished.
    return judge.budget.share_of((_count(judge) + _predicate(judge)) * flops, completing=True)


def search_end(judge: Judge, length: int, began: float, until: float) -> float:
    """Share of the budget at which a search for triggers of up to `length` tokens ends.

    Args:
        judge: what will report on the best trigger.
        length: tokens of the longest trigger.
        began: share of the budget, in [0, 1], that was spent before the search.
        until: share of the budget, in (0, 1], that the search and all that follows it for this goal may use.
    """
    left, needed = until - began, report_share(judge, length)
    return min(until - min(left / 2, needed + REPORT * left), latest_end(judge, length))


def check_affordable(judge: Judge, length: int, opening: int) -> None:
    """Refuses a budget that the report alone would exceed; where time is limited, measures what the report takes.

    Args:
        judge: what will report; of its budget nothing is used yet.
        length: tokens of the longest trigger.
        opening: tokens of a behaviour that is yet to be discovered, at most.

    Raises:
        ValueError: the budget does not suffice for the report.
    """
    budget, model, problem = judge.budget, judge.suspect.model, judge.engine.problem
    answer = _answer(judge, opening)
    count, flops = _count(judge), padded_flops(model, problem, length, answer)
    if budget.flops is not None and count * flops > budget.flops:
        raise ValueError(_too_small("operations", budget.flops, count * flops))
    if budget.seconds is not None:
        seconds, fits = completing_seconds(model, problem, length, answer, budget.seconds / count)
        if not fits:
            raise ValueError(_too_small("seconds", budget.seconds, count * seconds))
        budget.paced = _pace(judge), 0.0
        budget.measured(flops, seconds)


def room_to_tell(judge: Judge, texts: list[str], until: float) -> tuple[int, int]:
    """(how many of these texts, how many prompts) there is room for until that share of the budget; `surest` uses them.

    Fewer than two texts: there is no room.
    """
    problem, target = (judge.anywhere or judge.engine).problem, len(judge.goal.target_ids)
    longest = max(len(judge.engine.problem.encode(text)) for text in texts)
    one = judge.budget.share_of(completion_flops(judge.suspect.model, problem, longest, target)) / len(problem)
    # To find the strength, and to try random tokens in the place of an end.
    rows = max(0.0, until - judge.budget.share) / one - (HALVINGS + 1) * CALIBRATED - FEW * (RANDOM + 1)
    count = min(len(texts), int(rows / FEWEST_TOLD)) if len(problem) >= FEWEST_TOLD else 0
    return count, min(PROMPTS, int(rows / max(1, count)))


def measure_again(judge: Judge) -> None:
    """Where time is limited, corrects what completions take by how much busier the machine is than when it was told."""
    budget = judge.budget
    if budget.completing and budget.share - budget.paced[1] > DRIFT:
        before, _ = budget.paced
        budget.paced = _pace(judge), budget.share
        budget.completing *= budget.paced[0] / before


def _pace(judge: Judge) -> float:
    """Seconds of a short completion of one prompt: little beside the report, and as sensitive to other work."""
    model, times = judge.suspect.model, []
    longest = Prompts.from_ids([max(judge.engine.problem.filled([]), key=len)], device=model.device)
    for _ in range(2):  # the other processes of a busy machine make one of them slow by chance
        began = time.perf_counter()
        greedy(model, longest, PACE).tolist()
        times.append(time.perf_counter() - began)
    return min(times)


def padded_flops(model: PreTrainedModel, problem: Problem, length: int, answer: int) -> float:
    """Operations of completing every prompt, with `length` tokens in its slot, by `answer` tokens in one batch."""
    rows, longest = len(problem), max(map(len, problem.filled([])))
    # The last token is never read, and one position of each pass is unembedded.
    return forward_flops(model, rows * (longest + length + answer - 1)) + head_flops(model, rows * answer)


def completing_seconds(
    model: PreTrainedModel, problem: Problem, length: int, answer: int, limit: float
) -> tuple[float, bool]:
    """(seconds of completing every prompt once, measured or estimated; whether they may be within a limit).

    Batches of more and more prompts are completed until one settles it: it takes longer than the limit, as a larger one
    would, or all prompts keep to the limit even if no batch is quicker per prompt than this one.
    """
    # The longest first: every batch is padded to the same length as the whole.
    rows = sorted(problem.filled([0] * length), key=len, reverse=True)

    def seconds(size: int, tokens: int) -> float:
        prompts = Prompts.from_ids(rows[:size], device=model.device)
        began = time.perf_counter()
        greedy(model, prompts, tokens).tolist()  # a GPU is done only when the numbers are here
        return time.perf_counter() - began

    size, taken, slope = 1, seconds(1, answer), 0.0
    if taken > limit:
        # Reading takes longer the more prompts there are; a further token takes about as long for few as for many.
        reading = seconds(1, 1)
        return len(rows) * reading + max(0.0, taken - reading), False
    if len(rows) * taken < CLEAR * limit:
        return len(rows) * taken, True
    while size < len(rows):
        before, size = (size, taken), min(len(rows), 4 * size)
        taken = seconds(size, answer)
        slope = max(0.0, taken - before[1]) / (size - before[0])
        if taken > limit or len(rows) * taken <= size * limit:
            break
    return taken + slope * (len(rows) - size), taken <= limit


def _answer(judge: Judge, opening: int) -> int:
    """Tokens of each completion; a behaviour that is yet to be discovered has up to `opening`, or is a predicate."""
    unknown = 0 if judge.goal.target_ids else max(opening + BEYOND, ANSWER if _predicate(judge) else 0)
    return max(judge.goal.answer_tokens, unknown)


def _predicate(judge: Judge) -> bool:
    """Whether success is measured by a predicate, or may be: manners of replying are discovered beside a base."""
    return judge.goal.shows is not None or not (judge.goal.target_ids or judge.suspect.base is None)


def _count(judge: Judge) -> int:
    """Completions of every prompt in a report."""
    return 2 + CONTROLS + (judge.suspect.base is not None)


def _too_small(unit: str, given: float, needed: float) -> str:
    """What a user is told whose budget cannot hold the report; as much again is the least that a search needs."""
    low, high = (f"{number:.1e}" if unit == "operations" else f"{number:,.3g}" for number in (needed, 2 * needed))
    speed = ", at the speed measured here" if unit == "seconds" else ""
    return (
        f"the budget is {given:g} {unit}, but the report on a trigger takes {low} by itself{speed}; give {high} or "
        "more, or fewer or shorter prompts"
    )
