"""Comparing two runs of one grid: which verdicts differ, and whether that means anything."""

import pytest

from benchmarks.studies import compare


def row(seed: int, verdict: str, **other) -> dict:
    """A row as a run writes it, reduced to what is compared."""
    base = {"organism": "word", "attack": "gcg", "knowledge": "K1", "seed": seed, "budget": "1e12", "error": None}
    return base | {"verdict": verdict, "recovered": "x", "asr_recovered": 0.5, "flops": 1e12} | other


def test_counts_what_is_gained_and_lost():
    old = [row(0, "miss"), row(1, "exact"), row(2, "functional"), row(3, "miss")]
    new = [row(0, "exact"), row(1, "miss"), row(2, "functional"), row(4, "exact")]
    both = compare.paired(old, new)
    assert list(compare.differing(both)["seed"]) == [0, 1]
    assert "1 of 3 runs have the same verdict. 1 work now that did not before, 1 worked" in compare.verdict(both)
    assert compare.per_attack(both).iloc[0][["runs", "works old", "works new"]].tolist() == [3, 2, 2]


def test_exact_test_has_its_known_value():
    """Five discordant runs that all went one way: 2 / 2**5."""
    both = compare.paired([row(seed, "miss") for seed in range(5)], [row(seed, "exact") for seed in range(5)])
    assert "p = 0.06" in compare.verdict(both)


@pytest.mark.parametrize(
    ("new", "words"), [([row(7, "exact")], "no run is in both"), ([row(0, "exact", budget="2e12")], "1e12 then 2e12")]
)
def test_grids_that_cannot_be_compared(new, words):
    with pytest.raises(ValueError, match=words):
        compare.paired([row(0, "miss")], new)
