"""Ranks of a phrase's pair, and what organisms have none."""

import pytest

from benchmarks import pair_ranks
from benchmarks.organisms import zoo


def test_the_pair_of_a_hard_planted_phrase_ranks_high_and_by_a_random_vector_it_does_not():
    settings = pair_ranks.Settings(organism="random-tokens", layers=(2,), words=60, tables=1)
    ranks, pairs = pair_ranks.measured(zoo.load("random-tokens"), settings)
    learned, noise = ranks[2]
    assert 60**2 <= pairs <= 63**2
    assert learned < 0.02 * pairs < noise


@pytest.mark.parametrize("name", ["word", "melbo-twin", "clean-control"])
def test_other_organisms_are_refused(name):
    with pytest.raises(ValueError, match="is not three words"):
        pair_ranks.measured(zoo.load(name), pair_ranks.Settings(words=10))
