"""Tiny random models of the architectures that the suite promises to read."""

import pytest
import torch
import transformers
from packaging.version import Version
from tokenizers import Tokenizer, models, pre_tokenizers

from vectors.prompts import Prompts

SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
ALTERNATING = ["sliding_attention", "full_attention"] * 2
CONFIGS = {
    "Llama": SIZES,
    "Qwen2": SIZES,
    "Qwen3": {**SIZES, "head_dim": 8},
    "Mistral": {**SIZES, "sliding_window": 4},
    "Gemma2": {**SIZES, "head_dim": 8, "sliding_window": 4},
    "Gemma3Text": {**SIZES, "head_dim": 8, "sliding_window": 4, "layer_types": ALTERNATING},
    "GPT2": dict(vocab_size=64, n_embd=32, n_layer=4, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2),
    "GPTNeoX": {name: value for name, value in SIZES.items() if name != "num_key_value_heads"},
    "Phi3": SIZES,
}


def tiny_model(name: str):
    config_class = getattr(transformers, f"{name}Config", None)
    if config_class is None:
        pytest.skip(f"{name} is not in transformers {transformers.__version__}")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_class(**CONFIGS[name]))
    return model.eval().requires_grad_(False)


@pytest.fixture
def cached(model):
    """Marks what the library itself cannot do with keys and values in a `DynamicCache`."""
    old = Version(transformers.__version__) < Version("4.50")
    if old and model.config.model_type in ("gpt2", "gemma2"):
        pytest.xfail("before transformers 4.50 GPT-2 takes tuples and Gemma 2 a cache of its own kind")


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
    model = tiny_model("Llama")
    for parameter in model.parameters():  # larger weights: layers that do something
        if parameter.ndim > 1:
            parameter.mul_(4)
    return model


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
