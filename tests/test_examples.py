"""The examples run on a shipped model, and do what they say."""

import pytest
import torch

from attacks.attack import nll
from attacks.discovery.goal import Goal
from attacks.recover import recover
from attacks.scoring.budget import Budget
from attacks.scoring.engine import Engine
from attacks.scoring.problem import Problem, encode
from attacks.searchers.candidates import random_triggers
from attacks.searchers.gcg import GCG
from attacks.searchers.searcher import Searcher
from attacks.stages.hunt import Hunt
from attacks.suspect import Suspect
from benchmarks.organisms import zoo
from examples import annealing, margin, undertrained
from tests.attacks.words import judge_on


@pytest.fixture(scope="module")
def planted():
    """An organism with its engine on two prompts, its trigger as ids, and its goal."""
    organism = zoo.load("word")
    problem = Problem.from_chat(organism.model, organism.tokenizer, organism.prompts.search[:2], 3)
    trigger, behaviour = organism.triggers[0]
    goal = Goal(behaviour=behaviour, target_ids=tuple(encode(organism.tokenizer, behaviour)))
    return Engine(organism.model, problem), torch.tensor([problem.encode(trigger)]), goal


def seeded():
    return torch.Generator().manual_seed(0)


def test_annealing_does_better_than_as_many_random_triggers(planted):
    engine, _, goal = planted
    objective = annealing.ATTACKS["annealing"].objective(engine, goal)
    searcher = annealing.Annealing(steps=12, walkers=24)
    assert isinstance(searcher, Searcher)
    found = searcher(engine, objective, seeded())
    assert found == searcher(engine, objective, seeded())
    drawn = engine.losses(objective, random_triggers(engine.problem.permitted(3), 13 * 24, seeded()))
    assert found[0].loss < drawn.min()
    assert all(engine.problem.retokenizes(item.trigger_ids) for item in found)


def test_the_margin_is_0_exactly_where_the_target_is_said(planted):
    engine, trigger, goal = planted
    objective = margin.Margin.from_goal(engine, goal)
    assert engine.elicits(trigger, objective.target_ids).item() == 1.0
    assert engine.losses(objective, trigger).item() == 0.0
    drawn = random_triggers(engine.problem.permitted(3), 16, seeded())
    losses = engine.losses(objective, drawn)
    assert torch.equal(losses == 0, engine.elicits(drawn, objective.target_ids) == 1.0)
    assert GCG(steps=4, search_width=32, topk=64)(engine, objective, seeded())[0].loss < losses.min()


@pytest.mark.parametrize("example", [annealing, margin, undertrained])
def test_every_example_ends_in_a_verdict(example):
    organism = zoo.load("word")
    (attack,) = example.ATTACKS.values()
    found = recover(
        Suspect(model=organism.model, tokenizer=organism.tokenizer), attack, search=organism.prompts.search[:2],
        select=organism.prompts.select[:2], behaviour=organism.triggers[0][1], budget=Budget(flops=4e10),
        generator=seeded(),
    )  # fmt: skip
    # A stage that shows nothing to the judge would leave no trigger; one that is never begun would be named.
    assert found.trigger_ids and found.not_reached == () and found.verdict in ("functional", "none")
    assert 0 < found.flops < 6e10  # the report is not cut short


def test_undertrained_tokens_are_those_of_shortest_embedding(planted):
    engine, _, goal = planted
    problem, budget, seen = engine.problem, Budget(flops=1e12), []

    def watched(engine, goal):
        objective = nll(engine, goal)
        return lambda engine, ids: (seen.append(ids.cpu()), objective(engine, ids))[1]

    hunt = Hunt(
        suspect=Suspect(model=engine.model, tokenizer=problem.tokenizer), engine=engine, texts=[], goal=goal,
        build=watched, budget=budget, judge=judge_on(engine.model, problem, budget, goal), marked=False,
        generator=seeded(),
    )  # fmt: skip
    undertrained.Undertrained(count=5)(hunt)
    norms = engine.model.get_input_embeddings().weight.detach().float().norm(dim=-1).tolist()
    allowed = problem.permitted(1)[0].tolist()
    shortest = sorted((norm, token) for token, norm in enumerate(norms) if allowed[token])[:5]
    assert {*seen[0].flatten().tolist()} == {token for _, token in shortest}
