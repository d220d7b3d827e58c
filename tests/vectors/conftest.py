"""Every architecture as `model`, a Llama whose layers do something, a word-level tokenizer, prompts."""

import pytest
import torch
import transformers
from packaging.version import Version
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.architectures import CONFIGS, larger_weights, mark_caches, tiny_model
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
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, 64)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<s> {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w63{% endif %}"
    )
    return tokenizer


@pytest.fixture
def prompts():
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, 64, (length,), generator=generator).tolist() for length in (9, 6, 7)]
    return Prompts.from_ids(rows)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)
