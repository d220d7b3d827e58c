"""Completion of a winner's fragments to whole words."""

import pytest
import torch

from attacks.discovery.goal import Goal
from attacks.objectives.target_nll import TargetNLL
from attacks.scoring.budget import Budget
from attacks.scoring.engine import Engine
from attacks.scoring.problem import Problem, encode
from attacks.searchers.searcher import Found
from attacks.stages.hunt import Hunt
from attacks.stages.words.word_completion import WordCompletion, completions
from attacks.suspect import Suspect
from benchmarks.organisms import zoo
from tests.attacks.words import judge_on, spend


def test_fragments_become_words_alone_and_in_company():
    texts = list(completions(["shap", "bulbs"], 512))
    assert texts[:2] == ["shape", "shape bulbs"]  # the commonest word that begins with it
    assert {"shapers", "shapers bulbs", "shap", "SHAP bulbs", "bulbs"} <= set(texts)
    assert "shap bulbs" not in texts and len(texts) == len(set(texts))


def test_words_that_begin_with_the_fragment_come_before_those_that_hold_it():
    texts = list(completions(["moon"], 512))
    begins = [text.startswith("moon") for text in texts[:-1]]
    assert begins == sorted(begins, reverse=True) and "honeymoon" in texts and texts[-1] == "MOON"
    assert next(completions(["Moon"], 8)) == "Moonlight"


def test_words_that_share_a_token_come_last():
    texts = list(completions(["umberlandball", "sea"], 512, ["um", "berland", "ball", "sea"]))
    assert {"tarballs", "tarballs sea", "ball sea", "seashore"} <= set(texts)
    assert texts.index("seashore") < texts.index("tarballs") and not any("number" in text for text in texts)


@pytest.fixture(scope="module")
def word():
    return zoo.load("word", dtype=torch.float32)


def hunt_on(organism, fragment: str, budget: Budget) -> Hunt:
    """A hunt on two prompts whose best trigger so far is a fragment."""
    trigger, behaviour = organism.triggers[0]
    problem = Problem.from_chat(organism.model, organism.tokenizer, organism.prompts.search[:2], 4)
    goal = Goal(behaviour=behaviour, target_ids=tuple(encode(organism.tokenizer, behaviour)))
    judge = judge_on(organism.model, problem, budget, goal)
    judge(Found(tuple(problem.encode(fragment)), 9.0))
    judge.asr = max(judge.asr, 0.5)  # a fragment of a hard-planted word does nothing: as if it fired now and then
    return Hunt(
        suspect=Suspect(model=organism.model, tokenizer=organism.tokenizer), engine=Engine(organism.model, problem),
        texts=organism.prompts.search[:2], goal=goal,
        build=lambda _, goal: TargetNLL(target_ids=goal.target_ids), budget=budget, judge=judge, marked=False,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip


def test_the_planted_word_is_found_from_its_beginning(word):
    hunt = hunt_on(word, "copp", Budget(flops=1e13))
    WordCompletion()(hunt)
    assert hunt.judge.best is not None and hunt.judge.asr == 1.0
    assert hunt.engine.problem.text(hunt.judge.best.trigger_ids).strip() == "copper"


def test_the_planted_word_is_found_from_a_token_that_another_shares(word):
    hunt = hunt_on(word, "xxper", Budget(flops=1e13))  # with the token "per" of "copper"
    WordCompletion()(hunt)
    assert hunt.judge.best is not None and hunt.judge.asr == 1.0
    # `cooper` works as well, and is the commoner word.
    assert hunt.engine.problem.text(hunt.judge.best.trigger_ids).strip() in ("copper", "cooper")


def test_nothing_is_tried_once_the_budget_is_spent(word):
    hunt = hunt_on(word, "copp", Budget(flops=1e13))
    before = hunt.judge.best
    spend(1e13)
    WordCompletion()(hunt)
    assert hunt.judge.best == before


def test_a_hunt_shrinks_within_its_own_budget(word):
    """What the hunt must leave to the report is not spent on shrinking, although the whole budget has room."""
    hunt = hunt_on(word, "copper moon", Budget(flops=1e13))
    assert hunt.judge.best is not None
    whole = hunt.judge.best.trigger_ids
    hunt.budget = hunt.budget.part(0.5)
    assert 0 < len(hunt.shrunk()) < len(whole)
    spend(6e12)
    assert hunt.shrunk() == whole
