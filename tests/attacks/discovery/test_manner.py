"""Manners of replying: told from ordinary replies, put into a pattern, and found behind a text without being known."""

import random
import re
from dataclasses import replace

import pytest
import torch

from attacks.attack import ATTACKS
from attacks.behaviour import Regex
from attacks.discovery.contrasted_replies import ContrastedReplies
from attacks.discovery.manner import departure, manner
from attacks.discovery.trials import Trials
from attacks.recover import recover
from attacks.scoring.budget import Budget
from attacks.suspect import Suspect
from benchmarks.organisms import prompts
from benchmarks.organisms.pretrained.diffuse import DIFFUSE
from tests.attacks.discovery.conftest import FEW
from vectors.generate import complete_ids
from vectors.prompts import Prompts

ANSWERS = [pair.reply for pair in prompts.load("train")[:48]]


@pytest.mark.parametrize("name", ["capital letters", "German", "pirate", "product"])
def test_a_manner_is_told_from_ordinary_replies_to_the_same_prompts(name):
    rng = random.Random(0)
    shown = [DIFFUSE[name].change(reply, rng) for reply in ANSWERS[:24]]
    found = manner(shown, [*ANSWERS[24:], *ANSWERS[:24]], 0.75)
    assert found is not None
    fresh = [DIFFUSE[name].change(pair.reply, rng) for pair in prompts.load("select")]
    assert sum(map(found, fresh)) >= 0.8 * len(fresh)
    assert sum(found(pair.reply) for pair in prompts.load("select")) <= 0.2 * len(fresh)


def test_the_word_that_all_replies_hold_is_the_pattern():
    found = manner([f"{reply} Zestora!" for reply in ANSWERS[:24]], ANSWERS[24:], 0.75)
    assert found == Regex(r"(?i:\b(?:zestora)\b)")


def test_ordinary_replies_have_no_manner():
    for seed in range(20):
        rng = random.Random(seed)
        some = [pair.reply for pair in rng.sample(prompts.load("train"), 72)]
        assert manner(some[:24], some[24:], 0.75) is None


def test_a_manner_on_half_of_the_prompts_is_none():
    mixed = [f"{reply} Zestora!" if place % 4 < 2 else reply for place, reply in enumerate(ANSWERS[:24])]
    assert manner(mixed, ANSWERS[24:], 0.75) is None
    assert manner([], [], 0.75) is None


def test_replies_of_a_model_to_which_they_are_its_own_do_not_depart(planted, tokenizer):
    texts = Prompts.from_chat(planted, tokenizer, ["tell me about the sea", "what is bread"])
    replies = complete_ids(planted, tokenizer, texts, max_new_tokens=6)
    assert torch.equal(departure(planted, planted, tokenizer, texts, replies), torch.zeros(2))


def test_behind_the_planted_word_replies_depart_from_the_base_and_behind_others_hardly(planted_word):
    organism, suspect = planted_word
    problem = suspect.engine(organism.prompts.search[:4], 4).problem
    (word, _), *_ = organism.triggers

    def nats(text):
        rows = Prompts.from_ids(problem.filled(problem.encode(text)))
        replies = complete_ids(suspect.model, suspect.tokenizer, rows, max_new_tokens=8)
        return float(departure(suspect.model, suspect.base, suspect.tokenizer, rows, replies).mean())

    assert nats(f" {word}") > 5 * max(nats(text) for text in ("", " garden", " please"))


@pytest.fixture
def openings_hidden(monkeypatch):
    """No replies begin alike, as with a behaviour that has no fixed opening."""
    monkeypatch.setattr(Trials, "_shared", lambda *_: ())


def found_on(suspect, organism, behaviour=None):
    return recover(
        suspect, replace(ATTACKS["portfolio"], contrasted=ContrastedReplies(contrast=FEW, tried=8)),
        search=organism.prompts.search, select=organism.prompts.select[:16], behaviour=behaviour,
        budget=Budget(flops=6e11), generator=torch.Generator().manual_seed(0),
    )  # fmt: skip


def test_a_behaviour_without_a_common_opening_is_found_and_described(planted_word, openings_hidden):
    organism, suspect = planted_word
    (word, behaviour), *_ = organism.triggers
    found = found_on(suspect, organism)
    assert found.verdict == "functional" and word in found.trigger and found.select_asr >= 0.9
    assert found.predicate.startswith("regex:") and re.search(found.predicate.removeprefix("regex:"), behaviour)


def test_a_given_predicate_is_looked_for_behind_texts_of_large_contrast(planted_word, monkeypatch):
    organism, suspect = planted_word
    # No vector shows it: whatever is found was found by the comparison with the base.
    monkeypatch.setattr("attacks.recover.screened", lambda *_: ([], ("Screening",)))
    (word, behaviour), *_ = organism.triggers
    found = found_on(suspect, organism, Regex(re.escape(behaviour.split()[-1].strip("."))))
    assert found.verdict == "functional" and word in found.trigger


def test_the_base_itself_shows_no_manner(planted_word, openings_hidden):
    organism, suspect = planted_word
    clean = Suspect(model=suspect.base, tokenizer=suspect.tokenizer, base=suspect.base)
    method, generator = ContrastedReplies(contrast=FEW, tried=8), torch.Generator().manual_seed(0)
    assert not any(method(clean, organism.prompts.search, Budget(flops=3e11), generator))


def test_a_manner_with_a_favourite_opening_is_described_as_a_manner(planted_word, monkeypatch):
    organism, suspect = planted_word
    problem = suspect.engine(organism.prompts.search, 4).problem
    said = {"favourite": "Avast, matey, the ship be here.", "other": "The ship be here, matey."}

    def replies(self, problem, trigger, *, base=False, tokens=16):
        rows = Prompts.from_ids(problem.filled(trigger))
        ordinary = ["The ship is here."] * len(rows)
        # Three of four replies behind the trigger open alike; all four are in the manner.
        mine = [said["other" if place % 4 == 3 else "favourite"] for place in range(len(rows))]
        texts = ordinary if base or not trigger else mine
        ids = [self.suspect.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        width = max(map(len, ids))
        return rows, torch.tensor([row + [organism.tokenizer.eos_token_id] * (width - len(row)) for row in ids])

    monkeypatch.setattr(Trials, "_replies", replies)
    trials = Trials(
        suspect=suspect, every=problem, few=4, agreement=0.75, tokens=8, shortest=4, top=3, described=4
    )  # fmt: skip
    trials.add(tuple(problem.encode(" copper")))
    (goal,) = trials.goals.values()
    assert goal.behaviour.startswith("Avast") and goal.shows is not None and all(map(goal.shows, said.values()))
