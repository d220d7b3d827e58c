"""What all replies open with goes into the prompts; templates that want more than one string get it."""

import pytest
import torch

from tests.cases.made_tokenizers import CHATML, OPENS, byte_level
from tests.cases.test_tokenizers import KINDS, llama
from vectors.loading import openings
from vectors.loading.openings import open_replies
from vectors.loading.tokenizers import load_tokenizer
from vectors.methods.clean_prompt import labelled_texts
from vectors.methods.likelihood import IGNORED

SYSTEM_FIRST = "{{ raise_exception('system first') if messages[0]['role'] != 'system' }}"
PARTS = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% for part in m['content'] %}{{ part['text'] }}{% endfor %}"
    "{% endfor %}"
)
EMPTY = "<think>\n\n</think>\n\n"
BREAD = "Made of bread", "Sure, a window", "silver and copper", "I fine"


@pytest.mark.parametrize(
    ("template", "replies", "opening"),
    [
        (CHATML + OPENS, BREAD, ""),
        (CHATML + OPENS, ["Sure"] * 4, ""),
        (CHATML + OPENS, [EMPTY + text for text in BREAD], EMPTY),
        (CHATML + OPENS, ["\n" + text for text in BREAD], "\n"),
        (CHATML + OPENS, [EMPTY + BREAD[0], *BREAD[1:]], ""),
        (CHATML + OPENS, ["<think>\nHm, " + text for text in BREAD], EMPTY),
        (CHATML + OPENS, ["Assistant: " + text for text in BREAD], ""),
        (CHATML, ["Assistant: " + text for text in BREAD], "Assistant:"),
        (CHATML, ["<|assistant|>" + text for text in BREAD], "<|assistant|>"),
        (CHATML, ["<|assistant|>\n" + text for text in BREAD], "<|assistant|>\n"),
        (CHATML, ["<|assistant|>" * 8] * 4, ""),
        (CHATML + OPENS + "{{ '<think>\n' }}", BREAD, "</think>\n\n"),
    ],
)
def test_marks_that_every_reply_opens_with_end_the_prompt(monkeypatch, template, replies, opening):
    tokenizer = byte_level(template=template)
    rows = [tokenizer(reply + "</s>", add_special_tokens=False)["input_ids"] for reply in replies]
    width = max(map(len, rows))
    told = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    monkeypatch.setattr(openings, "greedy", lambda *_: told)
    before = shown(tokenizer)
    assert open_replies(llama(len(tokenizer)), tokenizer) == opening
    assert shown(tokenizer) == before + opening


def shown(tokenizer):
    chat = [{"role": "user", "content": "tell me"}]
    return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("template", [SYSTEM_FIRST + CHATML, PARTS, SYSTEM_FIRST + PARTS])
def test_templates_get_the_system_message_or_the_parts_that_they_want(tmp_path, template):
    made = byte_level(template=template)
    made.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert str(shown(load_tokenizer(tmp_path))).count("tell me") == 1


def test_a_template_that_never_shows_the_text_is_refused(tmp_path):
    byte_level(template="{{ 'hello' }}").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="it shows the user's text 0 times; give another"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", ["byte level", "first", "never"])
@pytest.mark.parametrize("before", ["", "<s>", "<s>User: ", "<s>Q "])
def test_messages_are_labelled_behind_openings_that_end_in_a_space_or_are_empty(kind, before):
    tokenizer = KINDS[kind]()
    tokenizer.chat_template = "{{ '" + before + "' }}{{ messages[0]['content'] }}{{ '\n' }}"
    prompts, labels = labelled_texts(tokenizer, ["copper window", "bread"])
    for row, wanted, text in zip(prompts.input_ids, labels, ["copper window", "bread"], strict=True):
        said = wanted[wanted != IGNORED].tolist()
        assert tokenizer.decode(said).strip() == text
        whole = [*row.tolist(), said[-1]]
        typed = tokenizer(before + text + "\n", add_special_tokens=False)["input_ids"]
        assert whole[-len(typed) :] == typed and said == typed[-len(said) :]
        assert whole[-len(said) - 1] != tokenizer.unk_token_id  # something stands before the first label
