"""A base that is planted in seconds: two random layers behind the tokenizer of the shipped chat base."""

import pytest
import torch
from transformers import AutoTokenizer

from benchmarks.organisms import zoo
from tests.architectures import learnable_llama


@pytest.fixture(autouse=True)
def _one_thread_and_an_own_cache(tmp_path_factory, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    """Folder of the random base."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = AutoTokenizer.from_pretrained(zoo.BASE)
    learnable_llama(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
