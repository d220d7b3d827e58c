"""A GGUF file as the model, written here: a tiny Llama with a byte-level tokenizer."""

import pytest
import torch
import transformers
from packaging.version import Version

from vectors.loading.gguf_files import read_head
from vectors.models import load_model

gguf = pytest.importorskip("gguf")
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<|endoftext|>{% endif %}"


@pytest.fixture
def file(tmp_path):
    return written(tmp_path / "tiny.gguf")


def written(path, more=(), settings=()):
    from tokenizers import pre_tokenizers

    tokens = ["<s>", "</s>", "<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    width, inner, vocab = 32, 64, len(tokens)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(2)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(vocab)
    writer.add_file_type(0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (vocab - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template(TEMPLATE)
    generator = torch.Generator().manual_seed(0)
    shapes = {"token_embd": (vocab, width), "output_norm": (width,), "output": (vocab, width)}
    for block in range(2):
        one = {f"attn_{part}": (width, width) for part in ("q", "k", "v", "output")}
        one |= {"ffn_gate": (inner, width), "ffn_up": (inner, width), "ffn_down": (width, inner)}
        one |= {"attn_norm": (width,), "ffn_norm": (width,)}
        shapes |= {f"blk.{block}.{name}": shape for name, shape in one.items()}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", torch.randn(shape, generator=generator).numpy())
    for name in more:
        writer.add_tensor(name, torch.ones(32).numpy())
    for name, value in settings:
        (writer.add_string if isinstance(value, str) else writer.add_uint16)(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_a_model(file, capfd):
    if Version(transformers.__version__) < Version("5"):
        with pytest.raises(ValueError, match="tiny.gguf is a GGUF file, read with transformers 5 only"):
            load_model(file)
        return
    model, tokenizer = load_model(file, device="cpu", dtype=torch.float32)
    assert capfd.readouterr().err == ""  # no bar of the conversion
    assert len(model.model.layers) == 2 and tokenizer.chat_template == TEMPLATE
    assert model.name_or_path == str(file)
    again, _ = load_model(f"{file.parent}:{file.name}", device="cpu", dtype=torch.float32)
    ids = torch.arange(8)[None]
    torch.testing.assert_close(model(input_ids=ids).logits, again(input_ids=ids).logits)


def test_files_that_are_none(file, tmp_path):
    with pytest.raises(ValueError, match="give .*:tiny.gguf"):
        load_model(tmp_path)
    (tmp_path / "broken.gguf").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="broken.gguf is no GGUF file"):
        load_model(tmp_path / "broken.gguf")
    with pytest.raises(ValueError, match="no GGUF file .*none.gguf"):
        load_model(tmp_path / "none.gguf")
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(ValueError, match="tiny.gguf") as error:
        load_model(file)
    assert "\n" not in str(error.value)


needs_5 = pytest.mark.skipif(Version(transformers.__version__) < Version("5"), reason="GGUF files are read with 5")


@needs_5
@pytest.mark.parametrize(
    ("more", "settings", "message"),
    [
        (["blk.1.attn_q.bias"], [], "holds .* values but LlamaForCausalLM has a place for"),
        (["blk.1.ffn_other.weight"], [], "does not read all of it"),
        ([], [("llama.rope.scaling.type", "yarn")], "scales positions .yarn."),
        ([], [("split.count", 3)], "is one of 3 parts"),
    ],
)
def test_what_transformers_passes_over_is_refused(tmp_path, more, settings, message):
    with pytest.raises(ValueError, match=f"tiny.gguf {message}|tiny.gguf .*{message}") as error:
        load_model(written(tmp_path / "tiny.gguf", more, settings), device="cpu")
    assert "\n" not in str(error.value)


@needs_5
def test_factors_of_positions_and_parts_by_name(tmp_path):
    load_model(written(tmp_path / "tiny.gguf", ["rope_freqs.weight"], [("llama.rope.scaling.type", "none")]))
    with pytest.raises(ValueError, match="is one of 2 parts; join them"):
        load_model((tmp_path / "tiny.gguf").rename(tmp_path / "tiny-00001-of-00002.gguf"))


@needs_5
def test_a_file_that_ends_early_is_told_by_its_length(file):
    whole = file.read_bytes()
    for length in (10, 2000, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="tiny.gguf is cut off or broken"):
            read_head(file)
    file.write_bytes(whole)
    reader = gguf.GGUFReader(str(file))
    assert read_head(file).values == {tensor.name: int(tensor.n_elements) for tensor in reader.tensors}
