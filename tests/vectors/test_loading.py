"""Models from folders, prompts from chats, behaviours from completions."""

import math

import pytest
import torch

from vectors.analysis import behaviours
from vectors.analysis.behaviours import Ranking, rank_behaviours
from vectors.models import fast_dtype, load_model
from vectors.prompts import Prompts
from vectors.residual import embedding
from vectors.steering import SteeringVectors, model_id


@pytest.fixture
def folder(llama, tokenizer, tmp_path):
    llama.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_saved_model_comes_back_ready_to_read(llama, folder, prompts):
    model, tokenizer = load_model(folder, device="cpu", dtype=torch.float32)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert tokenizer.padding_side == "left" and tokenizer.pad_token_id == 0
    ours, theirs = (m(input_ids=prompts.input_ids[:1]).logits for m in (model, llama))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in peft
def test_an_adapter_is_merged(llama, folder, tmp_path, prompts):
    peft = pytest.importorskip("peft")
    base, _ = load_model(folder, device="cpu", dtype=torch.float32)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(base, config).eval()
    wanted = adapted(input_ids=prompts.input_ids[:1]).logits.detach()
    adapted.save_pretrained(str(tmp_path / "adapter"))
    model, _ = load_model(folder, adapter=tmp_path / "adapter", device="cpu", dtype=torch.float32)
    assert not any("lora" in name for name, _ in model.named_parameters())
    torch.testing.assert_close(model(input_ids=prompts.input_ids[:1]).logits, wanted, atol=1e-4, rtol=1e-3)
    vectors = SteeringVectors(
        theta=torch.ones(1, 32), source_layer=1, target_layer=4, radius=1.0, method="x", model_id=model_id(model)
    )
    vectors.save(tmp_path / "v.safetensors")
    assert len(SteeringVectors.load(tmp_path / "v.safetensors", model)) == 1
    with pytest.raises(ValueError, match="belongs to a model of other weights"):
        SteeringVectors.load(tmp_path / "v.safetensors", load_model(folder, device="cpu", dtype=torch.float32)[0])
    with pytest.raises(ValueError, match="no peft adapter could be loaded"):
        load_model(folder, adapter=tmp_path, device="cpu")


def test_what_is_missing_is_named(folder, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="no model folder"):
        load_model(tmp_path / "nothing")
    with pytest.raises(ValueError, match="holds no config.json"):
        load_model(tmp_path)
    tokenizer.chat_template = None
    for file in ("chat_template.jinja", "tokenizer_config.json"):
        (folder / file).unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    for file in folder.glob("*token*"):
        file.unlink()
    with pytest.raises(ValueError, match="holds no tokenizer"):
        load_model(folder)


def test_fast_dtype_is_one_of_two():
    assert fast_dtype("cpu") in (torch.float32, torch.bfloat16)


def test_chat_prompts_are_left_padded_and_checked(llama, tokenizer):
    prompts = Prompts.from_chat(llama, tokenizer, ["w5 w6 w7", "w8"])
    assert prompts.input_ids.tolist() == [[1, 5, 6, 7, 63], [0, 0, 1, 8, 63]]
    assert prompts.attention_mask.tolist() == [[1] * 5, [0, 0, 1, 1, 1]]
    assert prompts.take([1]).input_ids.tolist() == [[1, 8, 63]]
    with pytest.raises(ValueError, match=r"got 2 prompts, empty ones at \[1\]"):
        Prompts.from_chat(llama, tokenizer, ["w5", " "])
    with pytest.raises(ValueError, match="72 tokens but the model's context is 64"):
        Prompts.from_chat(llama, tokenizer, ["w5 " * 70])


def test_ranking_keeps_shared_new_openings_and_merges_votes(llama, tokenizer, prompts, monkeypatch):
    def steered_completions(_model, _tokenizer, vectors, rows, **_settings):
        openings = {2: [40, 41, 42, 43, 2], 3: [9] * 5, 4: [10, 11, 2, 0, 0], 5: [20, 21, 22, 23, 2]}
        openings[7] = [50, 10, 11, 12, 13]
        answers = torch.tensor([openings.get(int(theta[0]), [10, 11, 12, 13, 2]) for theta in vectors.theta])
        answers = answers[:, None].repeat(1, len(rows), 1)
        for answer, theta in zip(answers, vectors.theta, strict=True):
            if int(theta[0]) == 6:  # on the first prompt only
                answer[1:] = torch.tensor([30, 31, 32, 33, 2])
        return answers

    unsteered = lambda _model, _tokenizer, rows, **_: torch.tensor([[40, 41, 42, 43, 2]] * len(rows))  # noqa: E731
    monkeypatch.setattr(behaviours, "complete_each", steered_completions)
    monkeypatch.setattr(behaviours, "complete_ids", unsteered)
    theta = torch.arange(8.0)[:, None].expand(8, 32).clone()
    vectors = SteeringVectors(theta=theta, source_layer=1, target_layer=4, radius=1.0, method="x", model_id="x")
    found = rank_behaviours(llama, tokenizer, [vectors[:6], vectors[6:]], prompts, Ranking(fewest=2, batch_size=2))
    # 2 answers like the clean model, 3 loops, 4 ends after two tokens, 5 is alone; 7 has the words of the others in it.
    assert [(b.token_ids, b.votes, b.agreement, b.reach) for b in found] == [((10, 11, 12, 13), 4, 1.0, 1.0)]
    assert found[0].vector.theta[0, 0] in (0.0, 1.0)
    ids = torch.tensor([[10, 11, 12]])
    expected = []
    for row, mask in zip(prompts.input_ids, prompts.attention_mask, strict=True):
        alone = row[mask.bool()][None]
        logits = llama(input_ids=torch.cat([alone, ids], dim=1)).logits[0, -4:].log_softmax(-1)
        expected.append(-logits.gather(-1, torch.tensor([10, 11, 12, 13])[:, None])[:, 0])
    nats = torch.stack(expected).mean(0)
    assert found[0].surprise == pytest.approx(float(nats.sum()), rel=1e-4)
    assert found[0].certainty == pytest.approx(float((-nats[1:].median()).exp()), rel=1e-4)
    votes = math.log(5) / math.log(32)
    assert found[0].score == pytest.approx(min(found[0].surprise, 12) / 12 * found[0].certainty * votes, rel=1e-6)


def test_a_base_model_without_chat_template_gets_plain_text_and_says_so(folder, tokenizer, caplog):
    tokenizer.chat_template = None
    for file in ("chat_template.jinja", "tokenizer_config.json"):
        (folder / file).unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    loaded = load_model(folder)[1]
    assert [record.message for record in caplog.records if "prompts are used as plain text" in record.message]
    chat = [{"role": "user", "content": "what is bread"}]
    shown = loaded.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert shown == "what is bread"


def test_vectors_know_weights_not_paths(folder, tmp_path):
    import shutil

    model, _ = load_model(folder, device="cpu", dtype=torch.float32)
    vectors = SteeringVectors(
        theta=torch.ones(1, 32), source_layer=1, target_layer=4, radius=1.0, method="x", model_id=model_id(model)
    )
    vectors.save(tmp_path / "v")
    shutil.copytree(folder, tmp_path / "moved")
    moved, _ = load_model(f"{tmp_path / 'moved'}/", device="cpu", dtype=torch.float32)
    assert len(SteeringVectors.load(tmp_path / "v", moved)) == 1
    with torch.no_grad():
        embedding(moved).add_(1.0)  # other weights under the same path
    with pytest.raises(ValueError, match="belongs to a model of other weights"):
        SteeringVectors.load(tmp_path / "v", moved)


@pytest.mark.parametrize(("exact", "dtype"), [(True, torch.bfloat16), (False, torch.bfloat16), (False, torch.float32)])
def test_weights_that_are_stored_in_more_digits_than_they_are_read_in_are_told_of(
    folder, tmp_path, caplog, monkeypatch, exact, dtype
):
    """Only where rounding changes them, and where the user has not asked for the format."""
    model, tokenizer = load_model(folder, device="cpu", dtype=torch.float32)
    for weight in model.parameters() if exact else ():
        weight.copy_(weight.bfloat16())
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    monkeypatch.setattr("vectors.models.fast_dtype", lambda _: dtype)
    caplog.clear()
    assert load_model(tmp_path / "m", device="cpu")[0].dtype == dtype
    assert ("is stored in float32 and read in bfloat16" in caplog.text) == (not exact and dtype == torch.bfloat16)
    caplog.clear()
    load_model(tmp_path / "m", device="cpu", dtype=torch.bfloat16)
    assert "is stored in" not in caplog.text
