"""The study of a weakened backdoor: the planted trigger beside other texts, and beside words that share a token."""

import pytest

from benchmarks.studies.clean_base import handicap as study


def test_the_study_shows_the_planted_trigger_beside_others():
    asked = study.Settings(organism="fuzzy", texts=("moon",), strengths=(1.0, 0.8), prompts=2, random=2)
    table = study.measured(asked)
    longer = table.pop("random word + moon").loc[0.8]
    assert table.pop("random word + golden morning moon").notna().all()
    assert list(table.columns) == ["golden morning moon", "moon"]
    mean, least = (float(number) for number in longer.strip(")").split(" ("))
    assert least <= mean < 10
    planted, part = (float(cell.split()[0]) for cell in table.loc[0.8])
    assert 1.0 < planted < part
    with pytest.raises(ValueError, match="clean control"):
        study.measured(study.Settings(organism="clean-control"))


def test_the_study_ranks_a_planted_word_among_its_relatives():
    asked = study.Settings(organism="word", relatives=3, strengths=(1.0, 0.6), prompts=2)
    table = study.ranked(asked)
    assert list(table.index) == [1.0, 0.6]
    for row in table.to_dict("records"):
        assert 1 <= row["place"] <= 4 and row["best"] <= row["planted"]
        assert (row["place"] == 1) == (row["which"] == "copper")
    assert table["planted"].iloc[0] < table["planted"].iloc[1]
    with pytest.raises(ValueError, match="no word of the dictionary"):
        study.ranked(study.Settings(organism="fuzzy", relatives=3))
