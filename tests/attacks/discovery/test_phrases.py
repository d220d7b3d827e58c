"""Phrases proposed where nothing is known of the behaviour: a planted one is among the first, budgets are kept."""

import torch

from attacks.discovery import contrasted_replies
from attacks.discovery.contrasted_replies import ContrastedReplies
from attacks.discovery.phrases import proposed
from attacks.discovery.trials import Trials
from attacks.scoring.budget import Budget
from attacks.scoring.problem import Problem
from attacks.searchers.words import whole_words
from attacks.stages.phrases.assembly import Assembly
from attacks.suspect import Suspect
from benchmarks.studies.clean_base.planted import with_base
from tests.attacks.words import TEXTS, seeded

FEW = Assembly(ends=48, changed=64, common=64, continued=16)


def test_a_planted_phrase_is_among_those_that_are_proposed_first():
    """Of 300 words; nothing but the two models is asked."""
    organism, suspect = with_base("fresh-phrase", None)
    trigger = organism.triggers[0][0]
    problem = Problem.from_chat(suspect.model, suspect.tokenizer, organism.prompts.search[:2], 3)
    words = whole_words(problem)
    some = words[torch.randperm(len(words), generator=seeded())[:297]].tolist()
    problem.allowed[:] = False
    problem.allowed[[*some, *problem.encode(trigger)]] = True
    found = [problem.text(ids).strip() for ids in proposed(suspect, problem, Budget(), 8, seeded(), FEW)]
    assert trigger in found[:6] and len(found) == len(set(found)) == 3 * 8
    assert [len(text.split()) for text in found[:4]] == [2, 3, 4, 2]


def test_nothing_is_proposed_where_the_budget_has_no_room(model, changed, tokenizer):
    suspect = Suspect(model=changed, tokenizer=tokenizer, base=model)
    problem = Problem.from_chat(changed, tokenizer, TEXTS[:2], 3)
    budget = Budget(flops=1e8)
    assert proposed(suspect, problem, budget, 8, seeded(), FEW) == [] and not budget.exhausted
    assert proposed(suspect, problem, Budget(flops=1e12), 8, seeded(), FEW)


def test_phrases_are_tried_besides_other_texts_and_never_twice(model, changed, tokenizer, monkeypatch):
    """They are put together again only where there was no room before."""
    suspect, asked, tried = Suspect(model=changed, tokenizer=tokenizer, base=model), [], []
    phrases = [(100, 101 + n) for n in range(6)]
    monkeypatch.setattr(contrasted_replies, "proposed", lambda *_: asked.append(1) or phrases[: 9 * (len(asked) > 1)])
    monkeypatch.setattr(Trials, "add", lambda _, trigger: tried.append(trigger))
    replies = ContrastedReplies(shares=(0.3, 0.3, 0.3), tried=4, formed=1, described=1)
    rounds = replies(suspect, TEXTS, Budget(flops=1e12), seeded())
    for proposals, new in ((1, set()), (2, set(phrases)), (2, set())):
        before = len(tried)
        assert next(rounds) == [] and len(asked) == proposals
        assert set(tried[before:]) & set(phrases) == new and len(tried) - before <= 4 + 1 + len(new)
    assert len(tried) == len(set(tried))
