"""Words of phrases are looked for by their last token, and read whole where it stands out."""

from dataclasses import replace

import pytest
import torch

from attacks.scoring.budget import Budget
from attacks.scoring.problem import Problem
from attacks.stages.phrases.completions import by_last_token, by_response, completed
from attacks.stages.phrases.interactions import Interactions
from attacks.suspect import Suspect
from tests.attacks.words import TEXTS, seeded

WORDS = [(100,), (101, 102), (103, 102), (104,), (105, 104)]


@pytest.fixture
def differences(changed, tokenizer):
    suspect, problem = Suspect(model=changed, tokenizer=tokenizer), Problem.from_chat(changed, tokenizer, TEXTS[:2], 3)
    found = Interactions.behind(problem, suspect, 0.7, WORDS, Budget())
    return replace(found, directions=torch.randn(32, 9, generator=seeded()))


def test_every_word_has_a_last_token_and_pieces_are_no_words(differences):
    assert differences.words == [*WORDS, (102,)] and differences.pieces == 1
    assert differences.whole() == [(0,), (1,), (2,), (3,), (4,)]
    assert by_last_token(differences) == {(0,): [(0,)], (5,): [(1,), (2,)], (3,): [(3,), (4,)]}


def test_texts_of_largest_score_are_completed_by_all_words_that_end_so(differences):
    """Those behind by turns with those before; their scores are the interactions of what was continued and the word."""
    behind = {(0, 3, 5): 5.0, (3, 0, 5): 4.0, (0, 3, 0): 1.0}
    before = {(5, 0, 0): 3.0, (5, 3, 3): 2.0}
    after, ahead = completed(differences, behind, before, 8, seeded())
    assert list(after) == [(0, 3, 1), (0, 3, 2), (3, 0, 1), (3, 0, 2)]
    assert list(ahead) == [(1, 0, 0), (2, 0, 0), (1, 3, 3), (2, 3, 3)]
    rests, words = [(0, 3), (3, 0)], [(1,), (2,)]
    assert after == pytest.approx(differences.interactions(rests, words, 1.0), rel=1e-3, abs=1e-6)
    assert ahead == pytest.approx(differences.interactions(words, [(0, 0), (3, 3)], 1.0), rel=1e-3, abs=1e-6)
    few, none = completed(differences, behind, before, 2, seeded())
    assert list(few) == [(0, 3, 1), (0, 3, 2)] and none == {}
    assert completed(differences, {}, {}, 8, seeded()) == ({}, {})


def test_pairs_that_interact_with_what_stands_beside_them_come_first(differences, monkeypatch):
    """By the product of three places; (3, 0) is last of the pairs and first behind and before other words."""
    beside = {(0, 3): (2.0, 2.0), (3, 3): (1.0, 1.0), (3, 0): (9.0, 9.0)}

    def interactions(_, befores, afters, again):
        assert again == 1.0
        place = len(befores[0]) == 1
        pairs = [(a, b) for a in befores for b in afters]
        return {(*a, *b): beside[b if place else a][place] for a, b in pairs}

    monkeypatch.setattr(Interactions, "interactions", interactions)
    assert by_response(differences, list(beside), seeded()) == [(3, 0), (0, 3), (3, 3)]  # 3*1*1, 1*2*2, 2*3*3
    monkeypatch.setattr(Interactions, "interactions", lambda *_: {})
    assert by_response(differences, list(beside), seeded()) == list(beside)
