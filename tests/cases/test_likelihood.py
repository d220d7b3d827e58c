"""A model that finds ordinary text less likely than chance is told: its tokenizer may be another model's."""

import torch

from attacks.loading import load_suspect
from tests.cases.made_tokenizers import byte_level
from tests.cases.test_tokenizers import llama
from vectors.loading.openings import MESSAGES
from vectors.prompts import Prompts


def trained(tokenizer):
    """A model that knows the messages by heart."""
    model = llama(len(tokenizer)).requires_grad_(True)
    prompts = Prompts.from_chat(model, tokenizer, MESSAGES)
    labels = prompts.input_ids.masked_fill(prompts.attention_mask == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for _ in range(40):
        optimizer.zero_grad()
        model(input_ids=prompts.input_ids, attention_mask=prompts.attention_mask, labels=labels).loss.backward()
        optimizer.step()
    return model


def told(folder):
    said = list[str]()
    load_suspect(folder, device="cpu", dtype=torch.float32, say=said.append)
    return said


def test_a_tokenizer_of_another_model(tmp_path):
    tokenizer = byte_level()
    tokenizer.save_pretrained(tmp_path)
    llama(len(tokenizer)).save_pretrained(tmp_path)  # random weights know nothing, and say nothing wrong
    assert told(tmp_path) == []
    model = trained(tokenizer)
    model.save_pretrained(tmp_path)
    assert told(tmp_path) == []
    # The same as giving every token the number of another.
    order = torch.randperm(len(tokenizer), generator=torch.Generator().manual_seed(0))
    for weight in (model.model.embed_tokens.weight, model.lm_head.weight):
        weight.data = weight.data[order]
    model.save_pretrained(tmp_path)
    (said,) = told(tmp_path)
    assert "ordinary text is less likely to this model than tokens drawn at random" in said
