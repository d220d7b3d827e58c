"""Goes on with a search that was ended by Ctrl-C, SIGTERM or kill -9, from the state in a file.

The journal (`attacks.journal`) writes the state down after every step: the discovery of goals, the learning of a
vector, each stage. Another process runs the same search from the beginning, but the steps that were done are answered
from the state. They set the clocks of the budget as well, so that all decisions between them come out as they did
before. The step that was broken off begins again on what is left of the budget; the best trigger that it had shown to
the judge is not forgotten.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from attacks.audit.state import Plain, State, difference
from attacks.behaviour import Regex
from attacks.discovery.goal import Goal
from attacks.journal import Discovered
from attacks.judging.judge import Judge
from attacks.scoring.budget import Budget
from attacks.searchers.searcher import Found
from attacks.stages.hunt import Hunt, Stage
from vectors.operations import executed
from vectors.steering import FIELDS, SteeringVectors

BEAT = 5.0
"""Seconds after which what the step under way has spent is written down, so that a killed process costs it too"""
GOAL = tuple(item.name for item in fields(Goal) if item.name not in ("shows", "vectors"))
"""Fields of a goal that are plain data. A given predicate is part of the request, a found one is written as a pattern,
and a vector as a tensor with plain data"""


def begun_in(path: Path) -> torch.dtype | None:
    """The number format of the search in a file, in which it has to go on; None where there is none to go on with.

    The faster format is measured by every process, and a busy machine may take the other one the next time.
    """
    try:
        dtype = getattr(torch, str(State.read(path).request.get("dtype")), None)
    except ValueError:  # what is broken is said where it is taken up
        return None
    return dtype if isinstance(dtype, torch.dtype) else None


class Resumable:
    """A journal that keeps its state in a file."""

    def __init__(self, path: Path, request: Plain, environment: Plain | None = None, *, restart: bool = False):
        """Takes up the search in the file where there is one, unless told to `restart`.

        Args:
            path: the file; it need not be there.
            request: what the search depends on, by name.
            environment: what its numbers depend on besides; where the file has another one, that is said.
            restart: whatever the file holds is replaced.

        Raises:
            ValueError: the file holds the search of another request.
        """
        self.path, self.state = path, State(request=request, environment=environment or {})
        self.resumed = not restart and path.exists() and self._read()
        """Whether there is anything of an earlier process to go on from, or its result."""
        self._judges: list[Judge] = []  # one per goal, in their order
        self._place = 0  # steps that this process has passed
        self._watched: Budget | None = None
        self._running: Judge | None = None  # of the step under way
        self._beaten, self._warned = 0.0, False
        if not self.resumed:
            self._write()  # from here on the file belongs to this request

    def goals(self, judge: Judge, generator: torch.Generator, discover: Callable[[], Discovered]) -> Discovered:
        """What `discover` finds, now or in an earlier process; the judge's goal is what is known before."""
        step = self._next("goals", judge, generator)
        if step is not None:
            self._set_clocks(judge.budget, *step["spent"])
            return [self._goal(judge, written) for written in step["goals"]], tuple(step["left_out"])
        with self._step(judge):
            goals, left_out = discover()
        self._done("goals", judge, generator, goals=[self._written(goal) for goal in goals], left_out=left_out)
        return goals, left_out

    def stage(self, hunt: Hunt, stage: Stage) -> None:
        """Runs a stage on the hunt, or leaves the hunt and its judge as the stage left them in an earlier process."""
        judge, name = hunt.judge, type(stage).__name__
        if judge.budget.stopped:  # interrupted: the last stages have nothing left to do
            stage(hunt)
            return
        if not any(judge is known for known in self._judges):
            self._judges.append(judge)
        step = self._next(name, judge, hunt.generator)
        if step is not None:
            self._leave(hunt, step)
            return
        with self._step(judge):
            try:
                stage(hunt)
            finally:
                # Not before the stage, for some do nothing where a trigger works already.
                for found in self.state.pending:
                    judge(found)
        self._done(
            name, judge, hunt.generator, best=judge.best, asr=judge.asr, description=judge.description,
            provisional=hunt.provisional, slot=hunt.engine.problem.trigger_length, gradients=hunt.engine.steps,
            built="objective" in vars(hunt), no_room=list(hunt.no_room), words_tried=hunt.words_tried,
        )  # fmt: skip

    def interrupted(self, seconds: float, flops: float) -> None:
        """Keeps what a search that was interrupted has spent, with its report."""
        self.state.spent = (seconds, flops)
        self._write()

    def finished(self, result: Plain) -> None:
        """Keeps the result in place of the steps."""
        kept = self.state
        self.state = State(request=kept.request, environment=kept.environment, spent=kept.spent, result=result)
        self._write()

    def _next(self, name: str, judge: Judge, generator: torch.Generator) -> Plain | None:
        """The next step, if an earlier process has done it; None: it has to be run, on the clocks as they were left."""
        state = self.state
        if self._watched is not judge.budget:
            self._watch(judge.budget)
        if self._place < len(state.steps) and state.steps[self._place]["name"] == name:
            self._place += 1
            generator.set_state(state.tensors["generator"])
            judge.trace[:] = state.trace
            return state.steps[self._place - 1]
        if self.resumed:
            # By the time of day a decision may come out otherwise; what followed on the old one is then void.
            del state.steps[self._place :]
            self._set_clocks(judge.budget, *state.spent)
            self.resumed = False
        return None

    def _leave(self, hunt: Hunt, step: Plain) -> None:
        """Leaves hunt, judge and clocks as a stage left them in an earlier process."""
        judge = hunt.judge
        judge.recall(self.state.measured[len(self._judges) - 1])
        judge.best = None if step["best"] is None else Found(*_tuples(step["best"]))
        judge.asr, judge.description, hunt.provisional = step["asr"], step["description"], step["provisional"]
        hunt.no_room[:], hunt.words_tried = step.get("no_room", []), step.get("words_tried", 0)
        hunt.engine.problem, hunt.engine.steps = hunt.engine.problem.resized(step["slot"]), step["gradients"]
        if step["built"]:
            _ = hunt.objective  # before the clocks are set, for it has been paid for
        self._set_clocks(judge.budget, *step["spent"])

    @contextmanager
    def _step(self, judge: Judge) -> Iterator[None]:
        """A step under way: now and then, and where Ctrl-C ends it, what it has spent and found so far is kept."""
        self._running, self._beaten = judge, time.perf_counter()
        try:
            yield
        except KeyboardInterrupt:
            self._note(judge)
            raise
        finally:
            self._running = None

    def _done(self, name: str, judge: Judge, generator: torch.Generator, **changed: object) -> None:
        """Writes a step down, unless it was interrupted: searchers swallow Ctrl-C and return."""
        if judge.budget.stopped:
            self._note(judge)
            return
        spent = (judge.budget.elapsed, judge.budget.used)
        # In one move, for Ctrl-C may come between two lines as well.
        self.state = replace(
            self.state,
            spent=spent,
            steps=[*self.state.steps, {"name": name, "spent": spent, **changed}],
            measured=[each.measured() for each in self._judges],
            trace=[*judge.trace],
            pending=[],
            tensors={**self.state.tensors, "generator": generator.get_state()},
        )
        self._place = len(self.state.steps)
        self._write()

    def _note(self, judge: Judge) -> None:
        """Writes down what the step under way has spent, and the best trigger by now."""
        self.state.spent = (judge.budget.elapsed, judge.budget.used)
        if judge.best is not None and judge.best not in self.state.pending:
            self.state.pending.append(judge.best)
        self._write()

    def _watch(self, budget: Budget) -> None:
        """Looks at the time whenever the budget tells how far it is used."""
        tell, self._watched = budget.watch, budget

        def watch(running: Budget) -> None:
            if tell is not None:
                tell(running)
            if self._running is not None and time.perf_counter() - self._beaten >= BEAT:
                self._beaten = time.perf_counter()
                self._note(self._running)

        budget.watch = watch

    def _set_clocks(self, budget: Budget, seconds: float, flops: float) -> None:
        """Sets what a budget has used."""
        budget.began, budget.began_flops = time.perf_counter() - seconds, executed() - flops

    def _written(self, goal: Goal) -> Plain:
        """A goal as plain data; the tensor of its vector is kept beside it."""
        written: Plain = {name: getattr(goal, name) for name in GOAL}
        if isinstance(goal.shows, Regex):
            written["shows"] = goal.shows.pattern
        if goal.vectors is not None:
            name = f"theta {len(self.state.tensors)}"
            self.state.tensors[name] = goal.vectors.theta.detach().cpu().contiguous()
            written["vectors"] = {"theta": name} | {field: getattr(goal.vectors, field) for field in FIELDS}
        return written

    def _goal(self, judge: Judge, written: Plain) -> Goal:
        """The goal that was written; a predicate that the user gave is that of the judge's goal."""
        plain = {name: _tuples(written[name]) for name in GOAL}
        if judge.goal.shows is None and "shows" in written:
            plain["shows"] = Regex(written["shows"])
        if "vectors" in written:
            theta = self.state.tensors[written["vectors"]["theta"]].to(judge.suspect.model.device)
            plain["vectors"] = SteeringVectors(**written["vectors"] | {"theta": theta})
        return replace(judge.goal, **plain)

    def _read(self) -> bool:
        """Whether the file holds the state of a search that had begun; it is then taken over."""
        try:
            state = State.read(self.path)
        except ValueError as error:
            print(f"{error}; the search begins anew", file=sys.stderr)
            return False
        if changed := difference(state.request, self.state.request):
            raise ValueError(
                f"{self.path} belongs to another search ({changed}); --restart searches anew in its place, another "
                "--out beside it"
            )
        begun = state.result is not None or state.spent != (0.0, 0.0)
        if begun and state.result is None and (changed := difference(state.environment, self.state.environment)):
            print(
                f"the search was begun elsewhere, and may not go on quite as it would there: {changed}", file=sys.stderr
            )
        self.state = replace(state, environment=self.state.environment)
        return begun

    def _write(self) -> None:
        """Writes the state; where that cannot be done the search goes on all the same, and that is said once."""
        try:
            self.state.write(self.path)
        except OSError as error:
            if not self._warned:
                reason = error.strerror or error
                print(f"{self.path} cannot be written ({reason}): this search cannot go on later", file=sys.stderr)
            self._warned = True


def _tuples(written: Any) -> Any:
    """Plain data with tuples in place of lists, which JSON makes of them."""
    return tuple(map(_tuples, written)) if isinstance(written, list) else written
