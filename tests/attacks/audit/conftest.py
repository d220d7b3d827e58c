"""A planted model in a folder and an audit of it, for tests that interrupt and resume audits."""

import pytest

from tests.attacks.audit.interrupted import LOADED_ONCE, PROMPTS, request


@pytest.fixture(scope="module")
def folder(planted, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    planted.save_pretrained(folder / "suspect")
    tokenizer.save_pretrained(folder / "suspect")
    (folder / "clean.txt").write_text("\n".join(PROMPTS))
    return folder


@pytest.fixture
def audit(folder, tmp_path, monkeypatch):
    """An audit of the planted model that writes to a folder of its own."""
    monkeypatch.setattr("attacks.__main__.load_model", LOADED_ONCE)
    return request(folder, tmp_path)
