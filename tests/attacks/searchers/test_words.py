"""Words of a dictionary: the forms they are written in, and which of them are alike."""

import math

import pytest
import torch

from attacks.scoring.problem import Problem
from attacks.searchers.words import FORMS, PLAIN, Form, Lexicon, encoded_words, form_of, known_words, naming
from tests.attacks.words import TEXTS


def test_a_form_is_read_from_a_text_and_written_again():
    for form in (PLAIN, *FORMS):
        text = form("garden")
        assert form_of(text) == form and form.bare(text) == "garden"
    assert form_of("<|GARDEN|>") == Form("<|", str.upper, "|>")
    assert form_of("|garDen|") is None and form_of("|xqzt|") is None


def test_words_in_a_form_are_typed_as_the_problem_types_them(model, tokenizer):
    problem = Problem.from_chat(model, tokenizer, TEXTS[:1], 3)
    form = Form("|", str.upper, "|")
    words = encoded_words(problem, form)
    assert words["|GARDEN|"] == problem.encode("|GARDEN|") and "garden" not in words
    problem.allowed[problem.encode("|")[-1]] = False
    assert not encoded_words(problem, form)


def test_every_token_of_a_lexicon_stands_in_a_word_of_its_cover(model, tokenizer):
    for form in (PLAIN, Form("|", str.upper, "|")):
        lexicon = Lexicon.of(Problem.from_chat(model, tokenizer, TEXTS[:1], 3), 12, form)
        cover = lexicon.cover
        assert 0 < len(cover) < len(lexicon.words) and len(cover) == len(set(cover))
        held = ({token for word in words for token in lexicon.words[word]} for words in (cover, lexicon.words))
        assert next(held) == next(held)
        bar = tokenizer("|", add_special_tokens=False)["input_ids"][-1]
        assert form == PLAIN or all(bar not in ids for ids in lexicon.words.values())


def test_words_are_alike_that_share_rare_tokens_and_little_else():
    common = {f"filler{number}": [1, 100 + number] for number in range(20)}
    lexicon = Lexicon(words={**common, "long": [7, 8, 9, 10], "near": [7, 8], "other": [50], "same": [8, 7]})
    alike = lexicon.alike([[7, 8, 1]])
    # By turns one of those of equal tokens and the like, and one of the commonest, that share a common token.
    assert alike[:6] == ["near", "filler0", "same", "filler1", "long", "filler2"]
    assert set(alike) == {*common, "near", "same", "long"} and len(alike) == 23
    assert lexicon.alike([[50], [7, 8, 9, 10]])[:2] == ["long", "other"]
    assert lexicon.alike([[9999]]) == []


def test_a_lexicon_may_be_empty_and_hold_one_word(model, tokenizer):
    problem = Problem.from_chat(model, tokenizer, TEXTS[:1], 3)
    problem.allowed[:] = False
    problem.allowed[problem.encode("garden")] = True
    assert [*Lexicon.of(problem, 4).words] == ["garden"]
    empty = Lexicon.of(problem, 4, Form("|", str.upper, "|"))
    assert not empty.words and not empty.cover
    assert empty.alike([problem.encode("garden")]) == [] and len(empty.promise(torch.zeros(9))) == 0


def test_a_word_promises_what_the_best_of_its_tokens_does():
    lexicon = Lexicon(words={"a": [0, 3], "b": [1], "c": [3, 2]})
    assert lexicon.cover == ["a", "b", "c"]
    assert lexicon.promise(torch.tensor([5.0, -1.0, -2.0])).tolist() == [5.0, -1.0, -2.0]  # token 3 has no value


def test_naming_takes_as_much_for_every_word(model, tokenizer):
    problem = Problem.from_chat(model, tokenizer, TEXTS[:1], 3)
    one, form = math.log(len(known_words())), math.log(len(FORMS))
    assert naming("garden", problem) == naming("xylophones", problem) == pytest.approx(one)
    assert naming("garden rope", problem) == pytest.approx(2 * one)
    assert naming("Garden", problem) == naming("|GARDEN|", problem) == pytest.approx(one + form)
    assert naming("gaRden", problem) == pytest.approx(one)  # no form that is known
    assert naming("xqzt", problem) == pytest.approx(len(problem.encode("xqzt")) * one)
