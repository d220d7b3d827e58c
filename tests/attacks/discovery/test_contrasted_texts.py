"""How texts are put together by contrast: what each length goes on from, and how texts are ranked in the end."""

import torch

from attacks.discovery.comparison import Comparison
from attacks.discovery.contrasted_texts import ContrastedTexts, Walk, _going_on
from attacks.searchers.words import dictionary
from attacks.suspect import Suspect
from benchmarks.organisms import zoo


def test_what_a_walk_goes_on_from():
    organism = zoo.load("other-word", dtype=torch.float32)
    base, _ = zoo.load_base("cpu", organism.card["base"], torch.float32)
    suspect = Suspect(model=organism.model, tokenizer=organism.tokenizer, base=base)
    problem = suspect.engine(organism.prompts.search[:1], 2).problem
    compared = Comparison.at_slot(suspect, problem, (0.4,))
    walk = Walk(
        settings=ContrastedTexts(words=2000),
        comparison=compared,
        problem=problem,
        generator=torch.Generator().manual_seed(0),
    )
    assert all(problem.text(ids).strip() not in dictionary() for ids in walk.cased[:20])
    assert {problem.text(ids).strip().lower() for ids in walk.cased} <= set(dictionary()[:2000])
    walk.firsts = [" to", " a"]
    put = [problem.text(ids).strip() for ids in walk._with_before((538,))]
    assert "toelse" in put and "a else" in put
    # Of those that end alike two go on.
    walk.best = {(5, 9): -3.0, (6, 9): -2.0, (7, 9): -1.5, (5, 8): -1.0}
    assert list(walk._unlike()) == [(5, 9), (6, 9), (5, 8)]
    # The mean over what was compared: a large contrast at the last token alone counts less.
    walk.losses = {(5,): -4.0, (5, 6): -4.0, (7,): -1.0, (7, 6): -5.0, (8, 6): -3.0}
    assert [walk._mean(ids) for ids in ((5, 6), (7, 6), (8, 6))] == [-4.0, -3.0, -3.0]


def test_words_go_on_from_their_first_token_and_then_from_their_first_two():
    words = [(1, 2, 3, 4), (1, 5, 6), (7, 8)]
    assert _going_on(words, 2, {(1,): -1.0}) == {(1, 2): -1.0, (1, 5): -1.0}
    # A third token that hides what the fourth shows does not end a word.
    assert _going_on(words, 4, {(1, 2): -2.0, (1, 5): -1.0}) == {(1, 2, 3, 4): -2.0}
