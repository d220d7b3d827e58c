"""Tiny random models of the architectures that the suite promises to read."""

import pytest
import torch
import transformers
from packaging.version import Version
from tokenizers import Tokenizer, models, pre_tokenizers

from vectors.residual import decoder

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


def tiny_model(name: str, **changes):
    config_class = getattr(transformers, f"{name}Config", None)
    if config_class is None:
        pytest.skip(f"{name} is not in transformers {transformers.__version__}")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_class(**{**CONFIGS[name], **changes}))
    return model.eval().requires_grad_(False)


def larger_weights(model):
    """Layers that do something, in a model of random weights; changes the model."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.mul_(4)
    return model


def word_tokenizer(vocabulary):
    """A word-level tokenizer of the words w4, w5 and so on, whose template ends in the word w63."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, vocabulary)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<s> {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w63{% endif %}"
    )
    return tokenizer


def learnable_llama(tokenizer):
    """Two random layers behind a tokenizer, that learn a few replies in seconds."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.3,  # logits large enough to learn with the unembedding frozen
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return transformers.LlamaForCausalLM(config)


def plain_logits(model, hidden):
    """Read off a residual by final norm, unembedding and soft cap."""
    parts = decoder(model)
    logits = parts.head(parts.norm(hidden))
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if not cap else cap * torch.tanh(logits / cap)


def mark_caches(model):
    """Marks what old transformers cannot do with keys and values in a `DynamicCache`."""
    old = Version(transformers.__version__) < Version("4.50")
    if old and model.config.model_type in ("gpt2", "gemma2"):
        pytest.xfail("before transformers 4.50 GPT-2 takes tuples and Gemma 2 a cache of its own kind")
