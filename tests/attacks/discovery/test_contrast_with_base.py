"""What suspect and clean base read differently: residuals side by side, and the words and behaviours found by them."""

import copy
from dataclasses import replace

import pytest
import torch

from attacks.discovery.comparison import Comparison
from attacks.discovery.contrasted_texts import ContrastedTexts, typable
from attacks.scoring.budget import Budget
from attacks.scoring.reading import Reading
from attacks.searchers.words import dictionary
from attacks.suspect import Suspect
from benchmarks.studies.clean_base import contrast as study
from benchmarks.studies.clean_base.planted import with_base
from tests.attacks.conftest import tiny
from tests.attacks.discovery.conftest import FEW


def full_difference(suspect, base, ids: list[int], layer: int) -> torch.Tensor:
    """The plain way: both models on the whole text."""
    row = torch.tensor([ids])
    states = [each(row, output_hidden_states=True).hidden_states[layer][0, -1] for each in (suspect, base)]
    return states[0] - states[1]


def test_a_reading_of_two_models_is_the_difference_of_whole_forward_passes(model, changed):
    begun = Reading.of([changed, model], [1, 40, 41], 2).extended(torch.tensor([50, 51, 52]))
    found = begun.taken(torch.tensor([2, 0])).appended(torch.tensor([60]), [1, 2])
    for row, second in enumerate((52, 50)):
        assert not found[1][row].any()  # below the changed block both read alike
        expected = full_difference(changed, model, [1, 40, 41, second, 60], 2)
        torch.testing.assert_close(found[2][row], expected.float())
    assert found[2].abs().max() > 1e-3


def test_a_reading_of_one_model_is_its_residual(model):
    found = Reading.of([model], [1, 40, 41], 2).expanded(2).appended(torch.tensor([60, 61]), [2])[2]
    for row, last in enumerate((60, 61)):
        expected = model(torch.tensor([[1, 40, 41, last]]), output_hidden_states=True).hidden_states[2][0, -1]
        torch.testing.assert_close(found[row], expected.float())


def test_the_contrast_is_the_distance_from_the_mean_difference_in_medians(model, changed, problem, tokenizer):
    suspect = Suspect(model=changed, tokenizer=tokenizer, base=model)
    compared = Comparison.at_slot(suspect, problem, (0.34, 0.67))
    others = torch.tensor([[100, 101], [102, 103], [104, 105], [106, 107], [108, 109]])
    texts = [(100, 101), (100, 111), (112, 101)]  # two that begin alike, and one that does not
    found = {item.trigger_ids: -item.loss for item in compared.ranked(texts, compared.contrast(others), Budget())}

    def difference(ids):
        return full_difference(changed, model, problem.before[0] + list(ids), 2)

    rows = torch.stack([difference(ids) for ids in others.tolist()])
    median = (rows - rows.mean(0)).norm(dim=-1).median()
    for ids in texts:
        # The first block was not changed, so that both depths are compared above it.
        wanted = (difference(ids) - rows.mean(0)).norm() / median
        assert found[ids] == pytest.approx(float(wanted), rel=1e-4)


def test_gradients_are_those_of_the_contrast_above_the_blocks_in_common(model, changed, problem, tokenizer):
    suspect = Suspect(model=changed, tokenizer=tokenizer, base=model)
    compared = Comparison.at_slot(suspect, problem, (0.34,))
    assert compared.common == 1 and compared.layers == [2]  # deeper than asked for: below, both models agree
    starts, others = torch.tensor([[100, 101]]), torch.tensor([[102, 103], [104, 105], [106, 107]])
    (layer,) = compared.shallow
    objective = compared.objective(others, layer)
    _, gradient = compared.engines[0].gradient(objective, starts)
    step = 1e-4
    onehot = torch.nn.functional.one_hot(starts, gradient.shape[-1]).double()
    for token in (110, 120):
        moved = onehot.clone()
        moved[0, 1, token] += step
        rise = objective(compared.engines[0], moved) - objective(compared.engines[0], onehot)
        assert float(rise / step) == pytest.approx(float(gradient[0, 1, token]), rel=0.05, abs=1e-3)


def test_models_that_agree_have_no_contrast(model, problem, tokenizer):
    suspect = Suspect(model=model, tokenizer=tokenizer, base=copy.deepcopy(model))
    compared = Comparison.at_slot(suspect, problem, (0.5,))
    assert [
        item.loss
        for item in compared.ranked([(100,), (102,)], compared.contrast(torch.tensor([[104], [106]])), Budget())
    ] == [0, 0]


def test_a_base_of_another_shape_is_not_compared(model, tokenizer, problem):
    suspect = Suspect(model=model, tokenizer=tokenizer, base=tiny(len(tokenizer), layers=2).double())
    assert suspect.comparable is None and Suspect(model=model, tokenizer=tokenizer).comparable is None
    assert ContrastedTexts()(suspect, problem, Budget(), torch.Generator()) == ([], [])
    with pytest.raises(ValueError, match="no clean base"):
        Comparison.at_slot(suspect, problem, (0.5,))


def test_texts_in_small_batches_are_ranked_alike(model, changed, problem, tokenizer, monkeypatch):
    suspect = Suspect(model=changed, tokenizer=tokenizer, base=model)
    few = ContrastedTexts(words=300, longest=3, spelled=2, likely=4, depths=(0.67,))
    wholes = few(suspect, problem, Budget(), torch.Generator().manual_seed(0))
    monkeypatch.setattr("attacks.scoring.reading.ROWS", 7)
    parts = few(suspect, problem, Budget(), torch.Generator().manual_seed(0))
    for whole, part in zip(wholes, parts, strict=True):
        assert [item.trigger_ids for item in whole] == [item.trigger_ids for item in part] and whole
    assert len({item.loss for item in wholes[0]}) > 20


@pytest.mark.parametrize("wrong", [{"depths": ()}, {"depths": (1.0,)}, {"continued": 0.0}, {"words": 0}, {"alike": 0}])
def test_settings_that_cannot_be_run_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ContrastedTexts(**wrong)


def test_few_texts_have_a_larger_contrast_than_the_planted_word(planted_word):
    organism, suspect = planted_word
    problem = suspect.engine(organism.prompts.search[:1], 2).problem
    ranked, made = FEW(suspect, problem, Budget(), torch.Generator().manual_seed(0))
    trigger, _ = organism.triggers[0]
    assert tuple(problem.encode(trigger)) in [item.trigger_ids for item in ranked[:3]]
    assert {len(item.trigger_ids) for item in ranked} >= {1, 2, 3} and len(ranked) == FEW.kept
    assert made and all(len(item.trigger_ids) > 1 for item in made)
    assert all(problem.retokenizes(item.trigger_ids) for item in [*ranked, *made])
    for texts in (ranked, made):
        firsts = [item.trigger_ids[0] for item in texts]
        assert max(map(firsts.count, firsts)) == FEW.alike


def test_what_begins_as_a_trigger_does_is_spelled_on(planted_word):
    """With the trigger out of the dictionary, its first token is continued by what the base finds likely."""
    organism, suspect = planted_word
    problem = suspect.engine(organism.prompts.search[:1], 2).problem
    texts = [ids for ids in typable(problem, dictionary()[:2000], 8) if len(ids) > 1]
    _, found = ContrastedTexts(words=1, longest=3, spelled=4)(
        suspect, problem, Budget(), torch.Generator().manual_seed(0)
    )
    longer = [item.trigger_ids for item in found if len(item.trigger_ids) > 1]
    assert longer and not set(longer) <= set(texts)


def test_a_budget_too_small_for_all_first_tokens_still_ranks_longer_texts(planted_word):
    organism, suspect = planted_word
    problem = suspect.engine(organism.prompts.search[:1], 2).problem
    whole = Budget(flops=1e13)
    everything, _ = replace(FEW, kept=10**6, alike=10**6)(suspect, problem, whole, torch.Generator().manual_seed(0))
    small = Budget(flops=0.55 * whole.used)
    some, _ = replace(FEW, kept=10**6, alike=10**6)(suspect, problem, small, torch.Generator().manual_seed(0))
    # The random strings of one length, and its gradients, are the most that it may be overspent by.
    assert small.flops is not None and small.used - small.flops < 1e10 and 0 < len(some) < len(everything)
    assert any(len(item.trigger_ids) > 1 for item in some)


def test_the_study_ranks_the_tokens_of_a_trigger_and_the_trigger(planted_word):
    organism, suspect = planted_word
    problem = suspect.engine(organism.prompts.search[:1], 2).problem
    settings = study.Settings(words=2000, sample=300, longest=3)
    (line,) = study.by_token("other-word", suspect, problem, "else", settings).to_dict("records")
    assert line["rank"] == 1 and line["contrast"] > line["largest other"] and line["of"] > 200
    (line,) = study.searched("other-word", suspect, problem, "else", settings).to_dict("records")
    assert line["rank, known"] <= 3 and "else" in line["largest contrast, known"]
    with pytest.raises(ValueError, match="clean control"):
        with_base("clean-control", None)
