"""Recorded runs judged again with other thresholds."""

import json

import pytest

from benchmarks.studies import thresholds

RATES = [(1.0, 0.0, 0.0), (0.92, 0.45, 0.0), (0.85, 0.0, 0.0), (1.0, 0.55, 0.0), (1.0, 0.0, 0.3)]
"""select_asr, control_rate, asr_without: two findings, and one that each threshold keeps out"""


@pytest.fixture
def folder(tmp_path):
    lines = [
        {"organism": f"m{i}", "attack": "a", "seed": 0, "error": None, "recovered": "x"}
        | dict(zip(("select_asr", "control_rate", "asr_without"), rates, strict=True))
        for i, rates in enumerate(RATES)
    ]
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_each_threshold_keeps_out_what_it_should(folder):
    table = thresholds.recorded(folder)
    assert thresholds.findings(table).tolist() == [True, True, False, False, False]
    lines = thresholds.sensitivity(table).set_index(["threshold", "changed to"])
    assert lines.loc[("WORKS", 0.8)][["findings gained", "findings lost", "models"]].tolist() == [1, 0, "m2"]
    assert lines.loc[("WORKS", 0.95)][["findings gained", "findings lost", "models"]].tolist() == [0, 1, "m1"]
    assert lines.loc[("NOISE", 0.6)]["models"] == "m3" and lines.loc[("NOISE", 0.4)]["findings lost"] == 1
    assert lines.loc[("ABSENT", 0.4)]["models"] == "m4" and lines.loc[("ABSENT", 0.01)]["findings lost"] == 0


def test_a_folder_without_rows(tmp_path):
    with pytest.raises(ValueError, match="no rows of attacks"):
        thresholds.recorded(tmp_path)
