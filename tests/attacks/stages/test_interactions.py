"""Interactions: residuals as in plain passes, interactions of words, with the base known or without."""

from dataclasses import replace

import pytest
import torch

from attacks.scoring.budget import Budget
from attacks.scoring.problem import Problem
from attacks.stages.phrases.interactions import Interactions, _explained
from attacks.suspect import Suspect
from tests.attacks.stages.test_interacting_words import differences_of
from tests.attacks.words import TEXTS, seeded, spend


def plain(suspect, problem, ids, number, layer):
    row = torch.tensor([[*problem.before[number], *ids]])
    mine, clean = (m(row, output_hidden_states=True).hidden_states[layer] for m in (suspect.model, suspect.base))
    return torch.stack([mine - clean, clean])[:, 0, -1]


def test_texts_of_any_lengths_are_read_as_in_whole_passes(model, changed, tokenizer):
    suspect = Suspect(model=changed, tokenizer=tokenizer, base=model)
    problem = Problem.from_chat(changed, tokenizer, TEXTS[:2], 3)
    words = [(100,), (101, 102), (103,)]
    differences = differences_of(suspect, problem, words)
    texts = [(0, 1), (1, 0), (2, 2), (0, 1, 2)]
    for number in (0, 1):
        found = differences.read(texts, number)
        assert found is not None
        layer = differences.layer
        for row, ids in zip(
            found.unbind(1), ([100, 101, 102], [101, 102, 100], [103, 103], [100, 101, 102, 103]), strict=True
        ):
            torch.testing.assert_close(row, plain(suspect, problem, ids, number, layer).float(), atol=1e-5, rtol=1e-4)
        mapping = torch.randn(32, 32, generator=seeded(number))
        mapped = replace(differences, directions=mapping).read(texts, number)
        assert mapped is not None
        torch.testing.assert_close(mapped, found @ mapping, atol=1e-5, rtol=1e-4)


def test_without_a_base_the_suspect_is_read_twice_as_deep_as_what_explains_it(model, changed, tokenizer):
    """Residuals after two blocks, and after one, are those of whole passes."""
    problem = Problem.from_chat(changed, tokenizer, TEXTS[:2], 3)
    alone = differences_of(Suspect(model=changed, tokenizer=tokenizer), problem, [(100,), (101, 102)])
    found = alone.read([(0, 1), (1, 0)], 1)
    assert found is not None and not alone.compared and alone.layer == 2
    for row, ids in zip(found.unbind(1), ([100, 101, 102], [101, 102, 100]), strict=True):
        ids = torch.tensor([[*problem.before[1], *ids]])
        hidden = changed(ids, output_hidden_states=True).hidden_states
        late_and_early = torch.stack([hidden[2], hidden[1]])[:, 0, -1]
        torch.testing.assert_close(row, late_and_early.float(), atol=1e-5, rtol=1e-4)


def test_without_a_base_half_of_what_is_explained_counts(changed, tokenizer, monkeypatch):
    """Cells that are twice the earlier ones, as a regression finds, count as if they were as long as those."""
    early = torch.randn(12, 12, 4, generator=seeded(3))
    early = early - early.mean(0) - early.mean(1, keepdim=True) + early.mean((0, 1))
    rows = torch.stack([2.0 * early, early]).flatten(1, 2)
    monkeypatch.setattr(Interactions, "read", lambda _, texts, __: rows[:, [12 * a + b for a, b in texts]])
    problem = Problem.from_chat(changed, tokenizer, TEXTS[:2], 3)
    words = [(n,) for n in range(12)]
    scores = differences_of(Suspect(model=changed, tokenizer=tokenizer), problem, words).interactions(words, words, 1.0)
    assert len(scores) == 144
    for (first, last), score in scores.items():
        assert score == pytest.approx(float(early[first, last].pow(2).sum()), rel=1e-3)


@pytest.mark.parametrize("keeps", [True, False])
def test_pairs_beside_all_words_have_the_interactions_of_the_whole_table(changed, tokenizer, monkeypatch, keeps):
    """The sample that means are taken over is all there is; a model that keeps other things is read pair by pair."""
    problem, suspect = Problem.from_chat(changed, tokenizer, TEXTS[:2], 3), Suspect(model=changed, tokenizer=tokenizer)
    monkeypatch.setattr("attacks.scoring.shared_prefix.keeps_keys_and_values", lambda _: keeps)
    differences = differences_of(suspect, problem, [(100,), (101, 102), (103,)])
    differences = replace(differences, directions=torch.randn(32, 9, generator=seeded()))
    words, estimated = [(0,), (1,), (2,)], []
    inner = Interactions._estimates
    monkeypatch.setattr(Interactions, "_estimates", lambda *args: estimated.append(inner(*args)) or estimated[0])
    found, whole = differences.likely(words, words, 9, 1.0, seeded()), differences.interactions(words, words, 1.0)
    assert set(found) == set(whole) and len(found) == 9 and len(estimated) == keeps
    assert [found[text] for text in whole] == pytest.approx(list(whole.values()), rel=1e-3, abs=1e-6)
    if keeps:
        best = (estimated[0].flatten().argmax() // 3).item(), (estimated[0].flatten().argmax() % 3).item()
        assert list(differences.likely(words, words, 1, 1.0, seeded())) == [best]
    spent = replace(differences, budget=Budget(flops=1e-9))
    spend(1.0)
    assert spent.likely(words, words, 9, 1.0, seeded()) == {}


def test_an_interaction_is_what_two_parts_do_together_on_both_prompts(model, changed, tokenizer, monkeypatch):
    """Rows and columns are additive but for two cells, one of which is there on the first prompt alone."""
    rows, columns = torch.randn(6, 1, 4, generator=seeded(1)), torch.randn(1, 5, 4, generator=seeded(2))
    tables = torch.stack([rows + columns, rows + columns + 3.0])
    tables[:, 2, 3] += torch.tensor([9.0, 0.0, 0.0, 0.0])
    tables[0, 4, 1] += torch.tensor([0.0, 9.9, 0.0, 0.0])
    cells = {(row, 10 + column): (row, column) for row in range(6) for column in range(5)}
    monkeypatch.setattr(
        Interactions,
        "read",
        lambda _, texts, number: torch.stack([tables[(number, *cells[text])] for text in texts]).expand(2, -1, -1),
    )
    suspect = Suspect(model=changed, tokenizer=tokenizer, base=model)
    differences = differences_of(suspect, Problem.from_chat(changed, tokenizer, TEXTS[:2], 3), [])
    scores = differences.interactions([(n,) for n in range(6)], [(10 + n,) for n in range(5)], 0.5)
    assert len(scores) == 15 and max(scores, key=scores.__getitem__) == (2, 13)
    assert scores[2, 13] > 3 * scores[4, 11]


def test_what_the_base_does_in_proportion_is_no_interaction(model, changed, tokenizer, monkeypatch):
    """Interactions follow the base's interactions, in another direction, but for a small one in a single cell."""
    clean = torch.randn(12, 12, 4, generator=seeded(3))
    found = clean @ torch.randn(4, 4, generator=seeded(4))
    found[5, 6] += torch.tensor([0.0, 0.0, 2.0, 0.0])
    assert found.norm(dim=-1).argmax() != 5 * 12 + 6
    rows = torch.stack([found, clean]).flatten(1, 2)
    monkeypatch.setattr(Interactions, "read", lambda _, texts, __: rows[:, [12 * a + b for a, b in texts]])
    suspect = Suspect(model=changed, tokenizer=tokenizer, base=model)
    differences = differences_of(suspect, Problem.from_chat(changed, tokenizer, TEXTS[:2], 3), [])
    words = [(n,) for n in range(12)]
    scores = differences.interactions(words, words, 0.1)
    assert max(scores, key=scores.__getitem__) == (5, 6)
    assert _explained(rows).any()
    assert not _explained(rows[:, :36]).any()  # 36 texts are too few for four dimensions
