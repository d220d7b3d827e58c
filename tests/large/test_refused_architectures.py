"""What is no causal language model is refused by name, before its weights are looked for."""

from typing import Any

import pytest
import transformers

from vectors.models import load_model

SMALL: dict[str, Any] = dict(
    hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9
)
REFUSED = {
    "T5": (
        transformers.T5Config(vocab_size=9, d_model=8),
        "T5ForConditionalGeneration",
        "encoder-decoder",
    ),
    "BART": (transformers.BartConfig(vocab_size=9, d_model=8), "BartForConditionalGeneration", "encoder-decoder"),
    "BERT": (transformers.BertConfig(**SMALL), "BertForMaskedLM", "an encoder: it fills gaps"),
    "RoBERTa": (transformers.RobertaConfig(**SMALL), "RobertaForMaskedLM", "an encoder: it fills gaps"),
    "ViT": (transformers.ViTConfig(), "ViTForImageClassification", "of the type vit"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(tmp_path, name):
    config, architecture, reason = REFUSED[name]
    config.architectures = [architecture]
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"{reason}.*\({architecture}\); give a causal language model"):
        load_model(tmp_path, device="cpu")


def test_a_type_that_transformers_does_not_know(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(ValueError, match="no causal language model could be loaded from .*unheard-of"):
        load_model(tmp_path, device="cpu")


def test_a_decoder_of_an_encoder_s_type_is_none_of_these(tmp_path):
    transformers.BertConfig(**SMALL, is_decoder=True).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no tokenizer"):
        load_model(tmp_path, device="cpu")
