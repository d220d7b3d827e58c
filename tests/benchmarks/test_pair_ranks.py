"""Ranks of parts of a trigger, alone and among other words: of a phrase's words and of its pair; what has none."""

import pytest

from attacks.scoring.problem import Problem
from benchmarks.organisms import zoo
from benchmarks.studies import pair_ranks
from benchmarks.studies.token_ranks import TokenRanks, among_others


def test_a_hard_planted_phrase_ranks_high_and_by_a_random_vector_it_does_not():
    settings = pair_ranks.Settings(organism="random-tokens", layers=(1,), words=60, tables=1)
    ranks, words = pair_ranks.measured(zoo.load("random-tokens"), settings)
    learned, noise = ranks[1]
    assert 60 <= words <= 63
    # Among 1,921 words: first 24-45th, last 19-59th, pair 2nd and 23rd of 3.7 million.
    assert max(learned[:2]) < 0.1 * words and learned[2] < 0.005 * words**2
    assert max(noise[:2]) > 0.3 * words and noise[2] > 5 * max(1, learned[2])


@pytest.mark.parametrize("name", ["word", "melbo-twin", "clean-control"])
def test_other_organisms_are_refused(name):
    with pytest.raises(ValueError, match="is not three words"):
        pair_ranks.measured(zoo.load(name), pair_ranks.Settings(words=10))


@pytest.mark.parametrize(("name", "apart", "least", "most"), [
    ("and", True, 0.0, 0.0), ("and", False, 0.0, 0.0), ("phrase", False, 0.0, 0.0), ("phrase", True, 0.1, 0.9),
])  # fmt: skip
def test_two_words_anywhere_keep_their_effect_among_others_and_a_phrase_taken_apart_does_not(name, apart, least, most):
    organism = zoo.load(name)
    problem = Problem.from_chat(organism.model, organism.tokenizer, organism.prompts.search[:1], 1)
    shares = among_others(organism, problem, 16, apart=apart, settings=TokenRanks(draws=80))
    assert len(shares) == 20 and least <= float(shares.median()) <= most
