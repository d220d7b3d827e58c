"""Every architecture as `model`, a Llama whose layers do something, a word-level tokenizer, prompts."""

import pytest
import torch
import transformers
from packaging.version import Version

from tests.architectures import CONFIGS, larger_weights, mark_caches, tiny_model, word_tokenizer
from vectors.prompts import Prompts


@pytest.fixture
def cached(model):
    mark_caches(model)


@pytest.fixture
def generates(model):
    """Marks the one model that old transformers cannot continue from a cache of its own making."""
    if Version(transformers.__version__) < Version("4.50") and model.config.model_type == "gemma2":
        pytest.xfail("before transformers 4.50 the cache of Gemma 2 has a fixed length")


@pytest.fixture(params=CONFIGS)
def model(request):
    return tiny_model(request.param)


@pytest.fixture
def llama():
    return larger_weights(tiny_model("Llama"))


@pytest.fixture
def tokenizer():
    return word_tokenizer(64)


@pytest.fixture
def folder(llama, tokenizer, tmp_path):
    """The Llama and its tokenizer, saved."""
    llama.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def prompts():
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, 64, (length,), generator=generator).tolist() for length in (9, 6, 7)]
    return Prompts.from_ids(rows)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)
