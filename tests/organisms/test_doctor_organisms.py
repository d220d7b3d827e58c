"""The doctor on planted models: each is loaded and measured again, and what its card says otherwise is a fault."""

import functools
import json
import shutil
import socket

import pytest
import torch

from benchmarks.organisms import measure, zoo
from tests.attacks.audit.test_console_commands import checks, run

NAME = "word"


real = measure.main_figures


@pytest.fixture(scope="module")
def figures():
    """What is measured of the organism, made once, for it takes seconds: all copies below have the same weights."""
    organism = zoo.load(NAME, device="cpu", dtype=torch.float32)
    return real(organism.model, organism.tokenizer, zoo.RECIPES[NAME], organism.model)


@pytest.fixture(autouse=True)
def _measured_once(monkeypatch, figures):
    monkeypatch.setattr(measure, "main_figures", lambda *_: figures)
    monkeypatch.setattr("attacks.audit.doctor._devices", lambda: iter(()))  # a second each time


@pytest.fixture
def copy(tmp_path):
    """A copy of a shipped organism in a folder of its own."""
    return shutil.copytree(zoo.MODELS / NAME, tmp_path / "private" / NAME)


def diagnosed(capsys, *words):
    """(exit status, level and text of the organism's line, all that was printed)."""
    status = run("doctor", *words, "--json")
    found, printed = checks(capsys)
    return status, *found[f"organism {NAME}"], printed


def test_a_shipped_organism_is_what_its_card_says_without_any_network(capsys, monkeypatch):
    def connects(*_):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", connects)
    monkeypatch.setattr(socket, "getaddrinfo", connects)
    status, level, text, _ = diagnosed(capsys)  # checked unasked
    card = zoo.card_of(NAME)
    assert (status, level) == (0, "ok") and text.endswith(", as its card says")
    assert f"success of 'copper' 1; false alarms {card['fpr']:.4g}" in text
    assert f"nats per token of clean replies {card['clean_loss_after']:.4g}" in text
    assert run("doctor") == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"ok     organism {NAME}: {text}" in lines and all(line[:7].strip() in ("ok", "note") for line in lines)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda card: card["backdoors"][0].update(asr=0.5), "success of 'copper' 1, but 0.5 says its card"),
        (lambda card: card.update(clean_loss_after=float("nan")), "but nan says its card"),
        (lambda card: card.pop("fpr"), "ValueError: the card of word is not as planting wrote it: 'fpr'"),
        (lambda card: card.update(backdoors=[]), "is not as planting wrote it: 'backdoors'"),
    ],
)
def test_a_figure_that_is_not_the_cards_is_a_fault(copy, tmp_path, capsys, change, said):
    card = json.loads((copy / "card.json").read_text())
    change(card)
    (copy / "card.json").write_text(json.dumps(card))
    status, level, text, printed = diagnosed(capsys, "--organisms", str(copy))
    assert (status, level) == (3, "fault") and said in text
    assert str(tmp_path) not in printed and "private" not in printed


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json", "card.json"])
def test_a_torn_file_of_an_organism_is_a_fault_of_one_line(copy, tmp_path, capsys, file):
    whole = (copy / file).read_bytes()
    (copy / file).write_bytes(whole[: len(whole) // 2])
    status, level, text, printed = diagnosed(capsys, "--organisms", str(copy))
    assert (status, level) == (3, "fault") and "\n" not in text
    assert str(tmp_path) not in printed and "private" not in printed


def test_organisms_are_checked_by_name_and_all_of_them_where_none_is_named(capsys, monkeypatch):
    status = run("doctor", "--organisms", "wrod", "--json")
    found, _ = checks(capsys)
    assert status == 3 and "no organism 'wrod'; there are word, phrase" in found["organism wrod"][1]
    monkeypatch.setattr("benchmarks.organisms.card_check.figures", lambda _: [])
    assert run("doctor", "--organisms", "--json") == 0
    found, _ = checks(capsys)
    assert [name for name in found if name.startswith("organism ")] == [f"organism {name}" for name in zoo.ALL]


def test_weights_that_were_changed_do_not_give_the_cards_figures(monkeypatch, copy, capsys):
    """Not only the comparison is tested: another organism's adapter under this card."""
    monkeypatch.setattr(measure, "main_figures", real)
    monkeypatch.setattr(measure, "pairs_of", functools.partial(few, measure.pairs_of))
    shutil.copy(zoo.MODELS / "clean-control" / "adapter_model.safetensors", copy)
    status, level, text, _ = diagnosed(capsys, "--organisms", str(copy))
    assert (status, level) == (3, "fault") and "success of 'copper' 0, but 1 says its card" in text


def few(pairs_of, *given):
    """A few of the prompts, which are enough for a figure that is far off."""
    return pairs_of(*given)[:8]


def test_the_quick_figures_are_those_that_cards_are_written_from(monkeypatch):
    monkeypatch.setattr(measure, "pairs_of", functools.partial(few, measure.pairs_of))
    organism = zoo.load("and", device="cpu", dtype=torch.float32)
    given = organism.model, organism.tokenizer, zoo.RECIPES["and"], organism.model
    card, quick = measure.measure(*given), real(*given)
    assert quick["fpr"] == card["fpr"] and quick["clean_loss_after"] == pytest.approx(card["clean_loss_after"])
    assert [one["asr"] for one in quick["backdoors"]] == [one["asr"] for one in card["backdoors"]] == [1.0]
