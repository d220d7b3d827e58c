"""A planted model in a folder and an audit of it, for tests that interrupt and resume audits."""

import pytest
import torch

from tests.attacks.audit.interrupted import LOADED_ONCE, PROMPTS, request


@pytest.fixture(scope="module")
def folder(planted, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    planted.save_pretrained(folder / "suspect")
    tokenizer.save_pretrained(folder / "suspect")
    (folder / "clean.txt").write_text("\n".join(PROMPTS))
    return folder


@pytest.fixture
def audit(folder, tmp_path):
    """An audit of the planted model that writes to a folder of its own."""
    return request(folder, tmp_path)


@pytest.fixture(autouse=True)
def _loaded_once(monkeypatch):
    monkeypatch.setattr("attacks.loading.load_model", LOADED_ONCE)
    # The faster number format is measured, and a busy machine may measure another one in the next process.
    monkeypatch.setattr("vectors.models.fast_dtype", lambda _: torch.float32)
