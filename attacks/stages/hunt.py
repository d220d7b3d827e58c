"""What the stages of an attack share: the suspect, one goal with its objective, the judge, and the budget.

A stage is a callable that gets a `Hunt`. It looks for triggers with the hunt's engine and objective, on the search
prompts, and shows what it finds to the hunt's judge, who measures it by behaviour on the `select` prompts.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice

import torch
from transformers import PreTrainedModel

from attacks.discovery.goal import Goal
from attacks.judging.judge import Judge
from attacks.scoring.budget import Budget
from attacks.scoring.engine import Engine, Objective
from attacks.scoring.planning import trigger_flops
from attacks.scoring.problem import Problem
from attacks.searchers.searcher import Found
from attacks.searchers.token_ranking import by_length, rank_triggers
from attacks.searchers.words import is_word
from attacks.suspect import Suspect

PROBE_TOKENS = 2
"""First tokens of the behaviour that a whole vocabulary or dictionary is ranked by, on one prompt."""

COMPARED = 256
"""Texts, the best on one prompt, that are compared on all search prompts."""

Build = Callable[[Engine, Goal], Objective]
"""Makes the objective of a goal on the engine's prompts."""


@dataclass(kw_only=True)
class Hunt:
    """One search for the trigger of one goal; every stage gets it and shows what it finds to the judge."""

    suspect: Suspect
    engine: Engine
    """Runs triggers on the search prompts."""
    texts: list[str]
    """The search prompts as user messages without the slot's marker."""
    goal: Goal
    build: Build
    """Makes the objective from an engine and the goal."""
    budget: Budget
    """What all stages together may spend."""
    judge: Judge
    """Knows the best trigger so far, by behaviour on the `select` prompts."""
    marked: bool
    """Whether the prompts mark their slot, in which case what stands there usually has a form (a name, a number)."""
    generator: torch.Generator
    """Draws whatever is random, on the CPU."""
    provisional: bool = False
    """Whether the trigger that works is so long or so uncertain that another one may be the planted trigger; later
    stages then go on although a trigger works."""
    no_room: list[str] = field(default_factory=list)
    """Class names of the stages that began and had to leave off at once, for the budget had no room for what they do;
    with what is left out in brackets where they did a part of it"""
    words_tried: int = 0
    """Words of the dictionary, the commonest, that have been tried by themselves"""

    def __post_init__(self):
        # Shares of stages are fractions of what the hunt had when it began, not of what is left.
        self._began = self.budget.share

    @cached_property
    def objective(self) -> Objective:
        """The objective on all search prompts."""
        return self.build(self.engine, self.goal)

    @property
    def works(self) -> bool:
        """Whether the best trigger works often enough."""
        return self.judge.works

    @property
    def sure(self) -> bool:
        """Whether the best trigger works often enough and elicits the behaviour with certainty."""
        best = self.judge.best
        return self.works and best is not None and self.judge.sure(best.trigger_ids)

    @property
    def over(self) -> bool:
        """Whether the budget is spent, or a trigger works that is not provisional."""
        return self.budget.exhausted or (self.works and not self.provisional)

    @property
    def told_apart_on(self) -> PreTrainedModel:
        """Model on which texts that may all work are compared.

        It is the suspect until a trigger works; then, where the clean base is known, the suspect with its backdoor
        weakened, on which the planted text keeps most of its effect (`attacks.judging.handicap`).
        """
        return self.suspect.model if self.judge.handicap is None else self.judge.handicap.model

    def shrunk(self) -> tuple[int, ...]:
        """The best trigger without the tokens that it does not need; empty where there is none."""
        shrunk = self.judge.shrunk(until=self.budget.until)
        return () if shrunk is None else shrunk.trigger_ids

    def settle(self, longest: int | None) -> None:
        """Marks a trigger that works as provisional if it is longer than `longest` tokens once shrunk, or not sure.

        A single word is never too long. Text that is no word of the dictionary is provisional too, unless the slot is
        marked, where other things than words are usual. With `longest` None any trigger that works ends the hunt.
        """
        if self.works and longest is not None:
            # Tokens that do nothing would make a short trigger look long.
            winner = self.shrunk()
            words = self.engine.problem.text(winner).split()
            named = all(map(is_word, words))
            short = len(winner) <= longest or (named and len(words) == 1)
            self.provisional = not (short and (named or self.marked) and self.judge.sure(winner))

    def part(self, share: float) -> Budget:
        """A budget from now on: that share, in (0, 1], of what the hunt had at first, or what is left of it."""
        until = self.budget.share + share * (self.budget.until - self._began)
        return self.budget.part(min(until, self.budget.until))

    def probe(self, problem: Problem | None = None) -> tuple[Engine, Objective]:
        """The first prompt alone, of the search or of `problem`: cheap enough for tens of thousands of candidates."""
        # The first tokens of the behaviour tell it from other replies, and one prompt tells good candidates from bad.
        probe = Engine(self.told_apart_on, (problem or self.engine.problem).take([0]))
        return probe, self.build(probe, replace(self.goal, target_ids=self.goal.target_ids[:PROBE_TOKENS]))

    def try_until_sure(self, found: Found) -> bool:
        """Shows a trigger to the judge; true once the best one is sure."""
        self.judge(found)
        return self.sure

    def try_all(self, found: Iterable[Found]) -> None:
        """Shows triggers to the judge: all of them, for the first that works need not be the best."""
        for item in found:
            self.judge(item)
            if self.budget.exhausted:
                return

    def try_best(self, found: Iterable[Found], count: int) -> None:
        """Shows the first `count` triggers that a user could type to the judge."""
        self.try_all(islice((item for item in found if self.engine.problem.retokenizes(item.trigger_ids)), count))

    def show_best(self, found: Sequence[Found], tried: int, budget: Budget) -> list[Found]:
        """Compares texts that were ranked on one prompt on all search prompts, and shows the judge the best `tried`.

        On one prompt, by the first tokens of the behaviour, a planted word and its like are often equally good. Returns
        what was compared, best first: the first `COMPARED` texts, or as many as the budget pays for.
        """
        engine, objective, compared = self.engine, self.objective, list[Found]()
        if self.judge.handicap is not None:
            engine = Engine(self.told_apart_on, engine.problem)
            objective = self.build(engine, self.goal)
        for ids in by_length(item.trigger_ids for item in found[: max(tried, self._room(found, budget))]):
            if not budget.exhausted:
                engine.problem = engine.problem.resized(ids.shape[1])
                compared += rank_triggers(engine, objective, ids, budget=budget)
        compared.sort(key=lambda item: item.loss)
        self.try_all(compared[:tried] or found[:tried])
        return compared

    def _room(self, found: Sequence[Found], budget: Budget) -> int:
        """How many of these texts, up to `COMPARED`, the budget pays for on all search prompts."""
        longest = max((len(item.trigger_ids) for item in found[:COMPARED]), default=0)
        target = len(self.goal.target_ids)
        each = budget.share_of(trigger_flops(self.suspect.model, self.engine.problem, float(longest), target))
        return COMPARED if each <= 0 else min(COMPARED, int((budget.until - budget.share) / each))


Stage = Callable[[Hunt], None]
"""Looks for triggers in its own way and shows what it finds to the hunt's judge."""
