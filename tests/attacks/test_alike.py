"""Families of candidates that begin with the same tokens."""

import pytest
import torch

from attacks.scoring.shared_prefix import alike


def families(rows, least):
    return [sorted(family.tolist()) for family in alike(torch.tensor(rows).long(), least)]


def test_swaps_fall_into_a_family_per_position():
    rows = [[1, 2, 3], [9, 2, 3], [8, 2, 3], [1, 9, 3], [1, 8, 3], [1, 2, 9], [1, 2, 8]]
    assert families(rows, 2) == [[1, 2], [3, 4], [0, 5, 6]]


def test_small_families_stay_with_what_they_shared():
    rows = [[1, 2, 3], [1, 2, 4], [1, 5, 3], [1, 6, 3], [7, 2, 3]]
    assert families(rows, 3) == [[4], [0, 1, 2, 3]]
    assert families(rows, 5) == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize("least", [1, 2, 5, 100])
def test_everyone_is_in_one_family(least):
    rows = torch.randint(4, (60, 3), generator=torch.Generator().manual_seed(0))
    found = alike(rows, least)
    assert sorted(torch.cat(found).tolist()) == list(range(60))


@pytest.mark.parametrize("rows", [[[1, 2]], [[1, 2], [1, 2]], [[], []]])
def test_copies_are_one_family(rows):
    assert families(rows, 1) == [list(range(len(rows)))]
