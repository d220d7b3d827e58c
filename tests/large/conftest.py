"""The tiny planted Llama of the attacks' tests, on disk and in memory."""

import pytest

from tests.attacks.conftest import planted, tokenizer

__all__ = ["planted", "tokenizer"]


@pytest.fixture
def folder(planted, tokenizer, tmp_path):
    planted.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"
