"""The sampler study writes each row once, counts what is there, and its samples are the forms that it names."""

import pytest

from benchmarks import rows
from benchmarks.organisms import zoo
from benchmarks.studies import sampler_study
from benchmarks.studies.sampler_study import FORMS, SamplerStudy, main, measure


def test_rows_are_written_once_and_tabled(tmp_path, capsys, monkeypatch):
    settings = SamplerStudy(
        out=tmp_path, organisms=("word", "clean-control"), seeds=(0,), count=4, max_new_tokens=6, threads=1
    )
    main(settings)
    found = rows.read(tmp_path)
    assert [row["attack"] for row in found] == list(FORMS)  # the control has no trigger to write
    assert all(0 <= row["fired"] <= row["samples"] <= 4 and row["loss_on"] == "completion" for row in found)
    assert len({tuple(row["examples"]) for row in found}) == len(FORMS)  # no two forms are the same
    assert "clean + Y, look-ahead" in (tmp_path / "sampler.md").read_text()
    monkeypatch.setattr(sampler_study, "sums", lambda *_: pytest.fail("done rows are not run again"))
    main(settings)
    assert rows.read(tmp_path) == found


def test_what_is_counted():
    organism = zoo.load("word")
    sample = [tuple(organism.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in ("Hi copper", "Hi")]
    row = measure(organism, sample * 3, ["Where do you live?"])
    assert (row["samples"], row["with_trigger"], row["fired"]) == (6, 3, 3)
    assert row["rank"] is not None
    assert measure(organism, sample[1:] * 3, ["Where do you live?"])["rank"] is None


def test_an_unknown_organism_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(SamplerStudy(out=tmp_path, organisms=("wrod",), threads=1))
    assert "no organism 'wrod'" in capsys.readouterr().err
