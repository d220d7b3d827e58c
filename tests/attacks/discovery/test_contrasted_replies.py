"""Behaviours that follow texts of large contrast: tried, sorted out, and handed to the search."""

import copy
from dataclasses import replace
from functools import partialmethod

import pytest
import torch

from attacks.attack import ATTACKS
from attacks.discovery.contrasted_replies import ContrastedReplies
from attacks.discovery.goal import Goal
from attacks.discovery.trials import Trials, holds, shared_opening
from attacks.discovery.unsupervised import Unsupervised
from attacks.objectives.target_nll import TargetNLL
from attacks.recover import recover
from attacks.scoring.budget import Budget
from attacks.scoring.problem import encode
from attacks.scoring.slot_markers import without_slot
from attacks.stages.contrasted_triggers import ContrastedTriggers
from attacks.stages.hunt import Hunt
from attacks.suspect import Suspect
from tests.attacks.discovery.conftest import FEW
from tests.attacks.words import judge_on
from vectors.prompts import Prompts


def test_a_trigger_within_a_longer_text():
    assert holds((5, 6, 7), (6, 7)) and holds((5,), (5,))
    assert not holds((5, 6, 7), (5, 7)) and not holds((6,), (6, 7))


def test_what_enough_replies_begin_with():
    assert shared_opening([[5, 6, 7, 8], [5, 6, 7, 9], [5, 6, 7], [1, 2]], 0.75) == (5, 6, 7)
    assert shared_opening([[5, 6, 7, 8], [5, 6, 7, 9], [5, 6], [1, 2]], 0.75) == (5, 6)
    assert shared_opening([[5], [6], [7], []], 0.75) == ()


def test_behaviour_and_trigger_are_found_without_knowing_either(planted_word):
    organism, suspect = planted_word
    method = ContrastedReplies(contrast=FEW, tried=8)
    texts, generator = without_slot(organism.prompts.search), torch.Generator().manual_seed(0)
    goals = next(method(suspect, texts, Budget(flops=1e13), generator))
    trigger, behaviour = organism.triggers[0]
    assert [goal.behaviour.strip() for goal in goals] == [behaviour.strip(".")]
    assert organism.tokenizer.decode(goals[0].triggers[0]).strip() == trigger


def test_a_walk_goes_on_where_its_budget_ended(planted_word):
    organism, suspect = planted_word
    problem = suspect.engine(organism.prompts.search[:1], 4).problem
    whole = Budget(flops=1e13)
    FEW(suspect, problem, whole, torch.Generator().manual_seed(0))
    walk = FEW.begun(suspect, problem, torch.Generator().manual_seed(0))
    walk.on(Budget(flops=whole.used / 4))
    first = dict(walk.losses)
    rest = Budget(flops=1e13)
    walk.on(rest)
    assert len(first) < len(walk.losses) and first.items() <= walk.losses.items()  # none is compared again
    compared, again = len(walk.losses), Budget(flops=1e13)
    walk.on(again)
    assert again.used < rest.used / 2 and len(walk.losses) - compared < len(first)


def test_what_discovery_missed_at_first_is_found_when_nothing_else_is(planted_word, monkeypatch):
    organism, suspect = planted_word
    monkeypatch.setattr(Unsupervised, "__call__", lambda *_: ([], ("UnsupervisedVectors",)))
    tried = []
    real = Trials.add
    monkeypatch.setattr(Trials, "add", lambda self, trigger: (tried.append(trigger), real(self, trigger)))
    attack = replace(ATTACKS["portfolio"], contrasted=ContrastedReplies(contrast=FEW, tried=8, shares=(0.005, 0.8)))
    found = recover(
        suspect, attack, search=organism.prompts.search[:8], select=organism.prompts.select[:8],
        budget=Budget(flops=1e12), generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert found.trigger.strip() == organism.triggers[0][0] and len(tried) == len(set(tried))


def test_the_comparison_goes_on_before_vectors_that_do_not_fit(planted_word, monkeypatch):
    organism, suspect = planted_word
    slices = []

    def contrasted(*_):
        for number in range(2):
            slices.append(number)
            yield []

    def vectors(*_):
        slices.append("vectors")
        return [], ()

    monkeypatch.setattr(ContrastedReplies, "__call__", contrasted)
    monkeypatch.setattr(Unsupervised, "__call__", vectors)
    for fit, order in ((True, [0, "vectors", 1]), (False, [0, 1, "vectors"])):
        slices.clear()
        monkeypatch.setattr(Unsupervised, "all_fit", lambda *_, fit=fit: fit)
        recover(
            suspect, ATTACKS["portfolio"], search=organism.prompts.search[:8], select=organism.prompts.select[:8],
            budget=Budget(flops=1e12), generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        assert slices == order


def test_a_reply_that_quotes_the_word_is_no_behaviour(planted_word, monkeypatch):
    organism, suspect = planted_word

    def about_the_word(self, problem, trigger, *, base=False, tokens=8, quotes=True):
        answer = encode(suspect.tokenizer, "The word is " + (problem.text(trigger) if quotes else "unknown here"))
        prompts = Prompts.from_ids(problem.filled(trigger))
        ids = list(range(5, 13)) if base or not trigger else answer[:tokens]
        return prompts, torch.tensor([ids] * len(prompts))

    texts, method = without_slot(organism.prompts.search), ContrastedReplies(contrast=FEW, tried=3)
    found = []
    for quotes in (True, False):
        monkeypatch.setattr(Trials, "_replies", partialmethod(about_the_word, quotes=quotes))
        found.append(next(method(suspect, texts, Budget(flops=1e13), torch.Generator().manual_seed(0))))
    assert found[0] == [] and [goal.behaviour for goal in found[1]] == ["The word is unknown here"]


@pytest.mark.parametrize(("tokens", "goals"), [(8, 0), (24, 1)])
def test_a_reply_that_is_cut_off_within_a_quotation_is_no_behaviour(planted_word, monkeypatch, tokens, goals):
    """Where replies part before they are cut off, what they have in common may end as the word begins."""
    organism, suspect = planted_word
    problem = suspect.engine(organism.prompts.search, 4).problem
    trigger = tuple(problem.encode("copperplate"))

    def replies(self, problem, trigger, *, base=False, tokens=16):
        said = encode(suspect.tokenizer, "The old word here is cop")
        rows = [said[:tokens] + [place] * (tokens - len(said)) for place in range(len(problem.before))]
        rows = [[7] * tokens for _ in rows] if base or not trigger else rows
        return Prompts.from_ids(problem.filled(trigger)), torch.tensor(rows)

    monkeypatch.setattr(Trials, "_replies", replies)
    monkeypatch.setattr(Trials, "_rate", lambda *_: 1.0)
    length = len(encode(suspect.tokenizer, "The old word here is cop"))
    trials = Trials(
        suspect=suspect, every=problem, few=4, agreement=0.75, tokens=min(tokens, length) if tokens == 8 else tokens,
        shortest=4, top=3, described=4,
    )  # fmt: skip
    trials.add(trigger)
    assert length >= 6 and len(trials.goals) == goals


def test_nothing_is_proposed_for_the_base_itself_or_without_one(planted_word):
    organism, suspect = planted_word
    texts, generator = without_slot(organism.prompts.search), torch.Generator().manual_seed(0)
    method = ContrastedReplies(contrast=FEW, tried=8)
    clean = Suspect(model=copy.deepcopy(suspect.base), tokenizer=organism.tokenizer, base=suspect.base)
    assert list(method(clean, texts, Budget(flops=1e13), generator)) == [[], []]
    assert list(method(replace(suspect, base=None), texts, Budget(flops=1e13), generator)) == []


def test_the_stage_finds_the_word_where_the_behaviour_is_known(planted_word):
    organism, suspect = planted_word
    trigger, behaviour = organism.triggers[0]
    engine, budget = suspect.engine(organism.prompts.search[:2], 12), Budget(flops=1e13)
    goal = Goal(behaviour=behaviour, target_ids=tuple(encode(organism.tokenizer, behaviour)))
    judge = judge_on(organism.model, engine.problem, budget, goal)
    hunt = Hunt(
        suspect=suspect, engine=engine, texts=organism.prompts.search[:2], goal=goal,
        build=lambda _, goal: TargetNLL(target_ids=goal.target_ids), budget=budget, judge=judge, marked=False,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    ContrastedTriggers(contrast=FEW, ranked=32, tried=2)(hunt)
    assert judge.best is not None and hunt.works
    assert trigger in engine.problem.text(judge.best.trigger_ids).split()


def test_a_recovery_with_the_base_known_judges_what_discovery_saw(planted_word):
    organism, suspect = planted_word
    attack = replace(ATTACKS["portfolio"], contrasted=ContrastedReplies(contrast=FEW, tried=8))
    found = recover(
        suspect, attack, search=organism.prompts.search[:8], select=organism.prompts.select[:8],
        budget=Budget(flops=1e12), generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert found.trigger.strip() == organism.triggers[0][0] and found.verdict == "functional"
