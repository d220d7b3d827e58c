"""Triggers that all work on a soft planting, told apart where its backdoor is weakened."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from attacks.attack import ATTACKS, Attack
from attacks.discovery.goal import Goal
from attacks.judging import judge as judges
from attacks.judging.handicap import PROMPTS, Handicap, surest
from attacks.judging.report import _shrunk, of_texts_that_work
from attacks.judging.report_cost import room_to_tell
from attacks.objectives.target_nll import TargetNLL
from attacks.recover import recover
from attacks.scoring.budget import Budget
from attacks.scoring.engine import Engine
from attacks.scoring.problem import encode
from attacks.searchers.searcher import Found
from attacks.suspect import Suspect
from benchmarks.organisms import zoo
from tests.attacks.words import judge_on, spend


@pytest.fixture(scope="module")
def soft():
    """An organism that fires on every part of its phrase, and its clean base."""
    organism = zoo.load("fuzzy", dtype=torch.float32)
    base, _ = zoo.load_base("cpu", organism.card["base"], torch.float32)
    return organism, Suspect(model=organism.model, tokenizer=organism.tokenizer, base=base)


def judge_of(organism, suspect: Suspect):
    engine = suspect.engine(organism.prompts.select[:32], 4)
    behaviour = organism.triggers[0][1]
    goal = Goal(behaviour=behaviour, target_ids=tuple(encode(organism.tokenizer, behaviour)))
    judge = judge_on(organism.model, engine.problem, Budget(flops=1e13), goal)
    judge.suspect = suspect
    return judge


def test_the_strength_is_that_at_which_the_trigger_half_works(soft):
    organism, suspect = soft
    problem = suspect.engine(organism.prompts.search[:6], 3).problem
    trigger, behaviour = organism.triggers[0]
    target = tuple(encode(organism.tokenizer, behaviour))
    handicap = Handicap(suspect=suspect, problem=problem, target_ids=target)
    ids = problem.encode(trigger)
    handicap.calibrate(ids)
    assert handicap.strength is not None and 0 < handicap.strength < 1
    above, below = (
        float(handicap._weakened(handicap.strength + step).elicits(torch.tensor([ids]), target)[0])
        for step in (0.1, -0.1)
    )
    assert above > 0.5 >= below
    # Far from both ends: the same trigger costs next to nothing on the suspect, and all of the text on the base.
    whole, none = (
        -float(handicap._weakened(strength).target_logprobs(torch.tensor([ids]), target).sum(-1).mean())
        for strength in (1.0, 0.0)
    )
    assert whole < handicap.nats(ids) / 2 and handicap.nats(ids) < none / 2


def test_a_part_that_fires_as_often_does_not_displace_the_planted_phrase(soft):
    organism, suspect = soft
    planted, part = organism.triggers[0][0], organism.triggers[0][0].split()[-1]
    judge = judge_of(organism, suspect)
    ids = {text: tuple(judge.engine.problem.encode(text)) for text in (planted, part)}
    assert judge.rate(ids[planted]) == judge.rate(ids[part]) == 1.0
    for text in (part, planted, part):
        judge(Found(ids[text], 0.0))
    assert judge.best is not None and judge.best.trigger_ids == ids[planted]
    assert judge.handicap is not None


def test_shrinking_keeps_the_tokens_that_matter_on_the_weakened_suspect(soft):
    organism, suspect = soft
    planted = organism.triggers[0][0]
    left = []
    for base in (suspect.base, None):
        judge = judge_of(organism, replace(suspect, base=base))
        judge(Found(tuple(judge.engine.problem.encode(f"{planted} the")), 0.0))
        shrunk = judge.shrunk()
        assert shrunk is not None
        left.append(judge.engine.problem.text(shrunk.trigger_ids).split())
    # The word in the middle adds little on as few prompts as these.
    assert {planted.split()[0], planted.split()[-1]} <= set(left[0]) and len(left[1]) == 1


def test_a_word_that_only_makes_the_text_longer_goes(soft):
    organism, suspect = soft
    planted = organism.triggers[0][0]
    judge = judge_of(organism, suspect)
    problem = judge.engine.problem
    for text in (f"{planted} flight", planted):  # behind the phrase any word lowers the nats of the behaviour
        judge(Found(tuple(problem.encode(text)), 0.0))
    assert judge.handicap is not None
    longer = problem.encode(f"{planted} flight")
    assert judge.handicap.idle(longer, {len(longer) - 1})
    # Of the phrase itself no random word does as well in the place of the last one.
    assert not judge.handicap.idle(longer, {len(longer) - 2})


def test_without_a_base_nothing_is_weakened(soft):
    organism, suspect = soft
    judge = judge_of(organism, replace(suspect, base=None))
    judge(Found(tuple(judge.engine.problem.encode(organism.triggers[0][0])), 0.0))
    assert judge.handicap is None and judge.works


def test_what_was_measured_is_taken_over_with_the_strength(soft):
    organism, suspect = soft
    first, second = judge_of(organism, suspect), judge_of(organism, suspect)
    ids = tuple(first.engine.problem.encode(organism.triggers[0][0]))
    first(Found(ids, 0.0))
    second.recall(first.measured())
    assert first.handicap is not None and second.handicap is not None
    assert second.handicap.strength == first.handicap.strength
    assert second.handicap.nats(ids) == first.handicap.nats(ids)


@pytest.fixture(scope="module")
def hard():
    """An organism that was planted with hard negatives, `copper`, on which longer words that begin so fire as well."""
    organism = zoo.load("word", dtype=torch.float32)
    base, _ = zoo.load_base("cpu", organism.card["base"], torch.float32)
    return organism, Suspect(model=organism.model, tokenizer=organism.tokenizer, base=base)


def test_of_texts_that_work_the_likeliest_to_be_planted_is_reported(soft, hard):
    cases = [
        (soft, ["moon", "golden moon", "coast golden moon"], "golden moon"),
        (hard, ["copperheads", "coppery", "copper"], "copper"),
    ]
    for (organism, suspect), texts, wanted in cases:
        for shown in (texts, texts[::-1]):  # whichever a search comes to first
            found = recover(
                suspect, Attack(objective=TargetNLL.from_goal, stages=(partial(_show, shown),), longest=6),
                search=organism.prompts.search, select=organism.prompts.select, behaviour=organism.triggers[0][1],
                budget=Budget(flops=1e13), generator=torch.Generator().manual_seed(0),
            )  # fmt: skip
            assert {relative.trigger for relative in found.family} >= {*texts}  # all of them work
            assert found.trigger == wanted and len(found.without) == len(found.trigger_ids)


def _show(texts, hunt):
    for text in texts:
        hunt.judge(Found(tuple(hunt.engine.problem.encode(text)), 0.0))


def test_a_longer_word_that_keeps_more_of_its_effect_is_not_taken_for_the_planted_one(hard):
    """At random places in the prompt any end makes the behaviour likelier; random tokens in its place tell."""
    organism, suspect = hard
    texts = organism.prompts.search[:8]
    anywhere = suspect.engine_of_random_places(texts, suspect.engine(texts, 4))
    assert anywhere is not None
    problem = anywhere.problem
    longer, planted = problem.encode("copperheads"), problem.encode("copper")
    target = tuple(encode(organism.tokenizer, organism.triggers[0][1]))
    handicap = Handicap(suspect=suspect, problem=problem, target_ids=target)
    handicap.calibrate(planted)
    assert handicap.nats(longer) < handicap.nats(planted)
    assert surest(handicap, [planted, longer], problem) == tuple(planted)
    assert surest(handicap, [longer, planted], problem) == tuple(planted)
    assert surest(handicap, [longer, planted], problem, stop=lambda: True) == tuple(longer)  # the other is not measured


@pytest.mark.parametrize(("flops", "told"), [(1e9, 0), (5e10, 3), (1e13, 3)])
def test_telling_texts_apart_keeps_to_the_budget(soft, flops, told):
    organism, suspect = soft
    judge = judge_of(organism, suspect)
    for text in ("moon", "golden moon", "morning moon"):
        judge(Found(tuple(judge.engine.problem.encode(text)), 0.0))
    judge.budget = Budget(flops=flops).started()
    texts = [relative.trigger for relative in judge.family()]
    count, prompts = room_to_tell(judge, texts, 0.5)
    assert count == told if told else count < 2
    assert prompts == PROMPTS if flops == 1e13 else prompts < PROMPTS
    before = judge.best
    assert of_texts_that_work(judge, "moon", 0.5) == "moon" or told
    assert judge.budget.share <= 0.5 and judge.best == before
    assert (judge.budget.used > 0) == (told > 0)


def test_a_text_that_works_on_the_base_or_less_often_is_not_reported_in_place_of_another(soft):
    """Shrinking asks the suspect alone: what it comes to may work on the base as well."""
    organism, suspect = soft
    for fault in ("", "on the base", "less often"):
        judge = judge_of(organism, suspect)
        problem = judge.engine.problem
        part, better = (tuple(problem.encode(text)) for text in ("moon", "golden moon"))
        judge(Found(part, 0.0))
        judge.rate(better)
        assert judge.handicap is not None
        judge.handicap.known[better] = 0.0  # the family is sorted by these
        if fault == "on the base":
            judge.base_engine = Engine(suspect.model, problem)  # on which everything works that does here
        elif fault:
            judge._rates[judge.engine, better] = 0.95
        wanted = "moon" if fault else "golden moon"
        judge.anywhere = Engine(suspect.model, suspect.engine(organism.prompts.select * 2, 4).problem)
        assert of_texts_that_work(judge, "moon", 1.0) == wanted
        if not fault:
            assert judge.best is not None and judge.best.trigger_ids == part
            reported = _shrunk(judge, 1.0)
            assert problem.text(reported.trigger_ids).strip() == wanted
            assert judge.best.trigger_ids == reported.trigger_ids  # with which the trace ends


def test_the_family_is_all_that_works_the_surest_first(soft, monkeypatch):
    organism, suspect = soft
    planted, part = organism.triggers[0][0], organism.triggers[0][0].split()[-1]
    for base in (suspect.base, None):
        judge = judge_of(organism, replace(suspect, base=base))
        problem = judge.engine.problem
        for text in (part, planted, "flight"):
            judge(Found(tuple(problem.encode(text)), 0.0))
        family = judge.family()
        monkeypatch.setattr(judges, "FAMILY", 1)
        shown = [relative.trigger for relative in judge.family(problem.encode(family[-1].trigger))]
        assert shown == [family[0].trigger, family[-1].trigger]  # the winner in any case
        monkeypatch.undo()
        assert {relative.trigger for relative in family} == {part, planted}  # `flight` does not work
        assert all(relative.rate >= 0.9 for relative in family)
        if base is None:
            assert {relative.strength for relative in family} == {1.0}
        else:
            assert judge.handicap is not None and family[0].trigger == planted
            assert [relative.nats for relative in family] == [
                judge.handicap.nats(problem.encode(relative.trigger)) for relative in family
            ]
            again = judge_of(organism, suspect)
            again.recall(judge.measured())
            assert again.family() == family


def test_texts_are_told_apart_on_the_weakened_suspect_once_one_works(soft):
    """Where no clean base is known they are told apart on the suspect, and stages for a weakened one do not run."""
    organism, suspect = soft
    planted, began = organism.triggers[0][0], []

    def find(hunt):
        assert hunt.told_apart_on is suspect.model
        hunt.judge(Found(tuple(hunt.engine.problem.encode(planted)), 0.0))

    def compare(hunt):
        weak = hunt.told_apart_on
        engine, objective = hunt.probe()
        (ranked,) = hunt.show_best([Found(tuple(hunt.engine.problem.encode(planted)), 0.0)], 1, hunt.budget)
        began.append((weak is engine.model, ranked.loss, hunt.budget.until))

    for base in (suspect.base, None):
        recover(
            replace(suspect, base=base), replace(ATTACKS["portfolio"], stages=(find,), weakened=(compare,), last=()),
            search=organism.prompts.search, select=organism.prompts.select[:8], behaviour=organism.triggers[0][1],
            budget=Budget(flops=1e13), generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
    spent: list[float] = []

    def spend_all(hunt):
        find(hunt)
        spend(10.0 * 1e13)

    never = replace(ATTACKS["portfolio"], stages=(spend_all,), weakened=(lambda hunt: spent.append(1.0),), last=())
    recover(
        suspect, never,
        search=organism.prompts.search, select=organism.prompts.select[:8], behaviour=organism.triggers[0][1],
        budget=Budget(flops=1e13), generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert not spent  # nothing is left to spend
    ((weak, loss, until),) = began
    assert weak and loss > 0.1  # on the suspect itself the planted trigger costs next to nothing
    assert until > 0.5  # although finding it took a small part of the budget
