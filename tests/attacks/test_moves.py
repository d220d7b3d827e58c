"""Neighbours of a trigger: all of them, none barred, of the right lengths."""

import itertools

import pytest
import torch

from attacks.searchers.moves import by_length, deletions, exchanges, insertions, propose, sample_swaps
from tests.attacks.words import seeded

IDS = torch.tensor([5, 6, 7])
ANY = torch.ones(40, dtype=torch.bool)


def masks_of(first, allowed, longest):
    return {n: torch.stack([first] + [allowed] * (n - 1)) for n in range(1, longest + 1)}


def random_masks(longest, vocab=40):
    allowed = torch.rand(vocab, generator=seeded(7)) < 0.6
    first = allowed & (torch.rand(vocab, generator=seeded(8)) < 0.5)
    return masks_of(first, allowed, longest)


def test_swaps_differ_in_one_permitted_token_and_never_repeat(problem):
    permitted = torch.stack([problem.first, problem.allowed])
    choices = torch.stack([row.nonzero()[:30, 0] for row in permitted])
    ids = choices[:, 3]
    swaps = sample_swaps(ids, choices, permitted, 50, 1, seeded())
    assert len(swaps) == 50 == len(set(map(tuple, swaps.tolist())))
    assert ((swaps != ids).sum(1) == 1).all()
    assert permitted[torch.arange(2), swaps].all()


def test_every_neighbour_is_there():
    assert deletions(IDS).tolist() == [[6, 7], [5, 7], [5, 6]]
    assert sorted(exchanges(IDS).tolist()) == [[5, 7, 6], [6, 5, 7], [7, 6, 5]]
    choices = torch.tensor([[10, 11], [12, 13], [14, 15]])
    longer = insertions(IDS, choices).tolist()
    expected = [[5, 6, 7][:p] + [t] + [5, 6, 7][p:] for p in range(4) for t in choices[min(p, 2)].tolist()]
    assert longer == expected
    one = IDS[:1]
    assert deletions(one).shape == (1, 0) and exchanges(one).shape == (0, 1)
    assert insertions(one, choices[:1]).tolist() == [[10, 5], [11, 5], [5, 10], [5, 11]]


@pytest.mark.parametrize(("length", "longest"), [(1, 1), (1, 4), (3, 4), (4, 4)])
@pytest.mark.parametrize("n_replace", [1, 3])
def test_nothing_barred_too_short_or_too_long(length, longest, n_replace):
    masks = random_masks(longest)
    # Barred tokens among the choices and in the way of a deletion: what is left over has to be filtered.
    choices = torch.randint(40, (length, 12), generator=seeded(1))
    starts = [row.nonzero()[:, 0] for row in masks[length]]
    seen = set()
    for seed in range(30):
        ids = torch.stack([row[int(torch.randint(len(row), (), generator=seeded(seed)))] for row in starts])
        parts = propose(ids, choices, masks, 24, n_replace, 0.6, seeded(seed))
        assert 1 <= sum(map(len, parts)) <= 24
        for part in parts:
            size = part.shape[1]
            seen.add(size)
            assert 1 <= size <= longest
            assert masks[size][torch.arange(size), part].all()
    assert seen == {n for n in (length - 1, length, length + 1) if 1 <= n <= longest}


def test_moves_have_their_share_and_do_not_repeat():
    masks = masks_of(ANY, ANY, 4)
    choices = torch.arange(10, 37).view(3, 9)
    assert [part.shape[1] for part in propose(IDS, choices, masks, 20, 1, 0.0, seeded())] == [3]
    swaps, *moved = propose(IDS, choices, masks, 20, 1, 0.5, seeded(1))
    # The multiset of tokens tells an exchange from a swap.
    assert all(sorted(row) != [5, 6, 7] for row in swaps.tolist())
    for part in moved:
        assert len(set(map(tuple, part.tolist()))) == len(part)
        if part.shape[1] == 3:
            assert all(sorted(row) == [5, 6, 7] and row != [5, 6, 7] for row in part.tolist())
    assert len(swaps) + sum(map(len, moved)) == 20
    assert sum(map(len, moved)) <= 10
    assert {part.shape[1] for part in moved} == {2, 3, 4}


def test_an_exchange_of_equal_tokens_is_no_candidate():
    masks = masks_of(ANY, ANY, 3)
    ids = torch.tensor([5, 5, 5])
    rows = [row for part in propose(ids, torch.arange(27).view(3, 9), masks, 30, 1, 0.9, seeded()) for row in part]
    assert [5, 5, 5] not in [row.tolist() for row in rows]
    # Deleting any of three equal tokens gives one trigger.
    assert [row.tolist() for row in rows].count([5, 5]) == 1


def test_parts_of_one_length_run_together_and_come_back_in_order():
    sizes = []

    def run(ids):
        sizes.append(tuple(ids.shape))
        return ids.sum(1)

    parts = [torch.full((count, length), 10 * i) for i, (count, length) in enumerate([(2, 3), (1, 2), (4, 3), (3, 2)])]
    results = by_length(run, parts)
    assert sizes == [(6, 3), (4, 2)]
    for part, result in itertools.zip_longest(parts, results):
        assert torch.equal(result, part.sum(1))
