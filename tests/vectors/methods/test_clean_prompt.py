"""Vectors learned by likelihood: the shared leaf, the clean-prompt vector, bisection of the supervised radius."""

from functools import partial
from pathlib import Path

import pytest
import torch

from vectors.generate import complete_ids
from vectors.methods.clean_prompt import CleanPromptVector, labelled_texts, round_user
from vectors.methods.controls import random_directions
from vectors.methods.likelihood import IGNORED, fit_likelihood, label_nll
from vectors.methods.supervised import SupervisedVector, elicits
from vectors.models import load_tokenizer
from vectors.prompts import Prompts
from vectors.residual import cache_source, mean_norm, steer

BASE = Path(__file__).parents[3] / "benchmarks" / "organisms" / "models" / "base"
TEXTS = ["w10 w11 w12", "w10 w11", "w10 w13 w12 w11", "w11 w12 w10", "w12 w10 w11 w13", "w13 w11", "w12", "w10 w12 w11"]
END = 63
"""What the test tokenizer's template writes behind the message"""


def plain_nll(model, tokenizer, texts, theta):
    """Nats per token, mean per text and then over texts: one unpadded full forward each, steered by a hook."""
    means = []
    for text in texts:
        ids = tokenizer("<s> " + text, add_special_tokens=False)["input_ids"] + [END]
        with steer(model, 1, theta), torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
        means.append(-logits[:-1].gather(1, torch.tensor(ids[1:])[:, None]).mean())
    return float(torch.stack(means).mean())


def fitted(model, tokenizer, texts=TEXTS, pad=0, steps=40):
    """(source, labels, vectors, nats) at two norms."""
    prompts, labels = labelled_texts(tokenizer, texts)
    wide = torch.full((len(texts), pad), 33)
    prompts = Prompts(
        input_ids=torch.cat([wide, prompts.input_ids], dim=1),
        attention_mask=torch.cat([0 * wide, prompts.attention_mask], dim=1),
    )
    labels = torch.cat([torch.full_like(wide, IGNORED), labels], dim=1)
    source = cache_source(model, prompts, 1)
    norms = mean_norm(source) * torch.tensor([[0.3], [0.6]])
    generator = torch.Generator().manual_seed(0)
    start, losses = (
        random_directions(len(norms), source.hidden.shape[-1], generator),
        partial(label_nll, model, source, labels),
    )
    theta, nll = fit_likelihood(losses, start, norms, steps=steps, lr=0.05)
    return source, labels, theta, nll


def test_likelihood_on_the_slice_is_that_of_full_forwards(model, tokenizer):
    _, _, theta, nll = fitted(model, tokenizer, steps=3)
    assert nll.tolist() == pytest.approx([plain_nll(model, tokenizer, TEXTS, row) for row in theta], rel=1e-4)


def test_learned_vectors_beat_none_and_random_ones_of_equal_norm(llama, tokenizer, generator):
    source, labels, theta, nll = fitted(llama, tokenizer)
    # Of the 4.1 nats that a random model needs (log 64), the smaller norm saves 0.2 and the larger 0.4.
    assert torch.all(nll < plain_nll(llama, tokenizer, TEXTS, torch.zeros(32)) - 0.1)
    torch.testing.assert_close(theta.norm(dim=-1), mean_norm(source) * torch.tensor([0.3, 0.6]))
    for vector, reached in zip(theta, nll, strict=True):
        random = vector.norm() * random_directions(50, 32, generator)
        assert reached < label_nll(llama, source, labels, random).mean(1).min()


def test_padding_and_batching_change_nothing(llama, tokenizer):
    source, labels, theta, nll = fitted(llama, tokenizer)
    _, _, padded, padded_nll = fitted(llama, tokenizer, pad=5)
    torch.testing.assert_close(padded, theta, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(padded_nll, nll, atol=1e-4, rtol=1e-4)
    per_text = label_nll(llama, source, labels, theta)
    for row, text in enumerate(TEXTS):
        alone, alone_labels = labelled_texts(tokenizer, [text])
        single = label_nll(llama, cache_source(llama, alone, 1), alone_labels, theta)
        torch.testing.assert_close(single[:, 0], per_text[:, row], atol=1e-4, rtol=1e-4)


def test_only_labelled_positions_are_unembedded(llama, tokenizer):
    prompts = Prompts.from_ids([[5, 6, 7, 8, 9], [10, 11]])
    labels = torch.full_like(prompts.input_ids, IGNORED)
    labels[:, -1] = 20
    seen = []
    handle = llama.lm_head.register_forward_pre_hook(lambda _module, args: seen.append(args[0].shape))
    label_nll(llama, cache_source(llama, prompts, 1), labels, torch.zeros(3, 32))
    handle.remove()
    assert seen == [(3, 2, 32)]  # three vectors, one label in each of two prompts


def test_what_the_likelihood_refuses(llama, tokenizer):
    prompts, labels = labelled_texts(tokenizer, TEXTS[:2])
    source = cache_source(llama, prompts, 1)
    with pytest.raises(ValueError, match=r"labels have shape \(2, 3\) but the prompts \(2, 4\)"):
        label_nll(llama, source, labels[:, 1:], torch.zeros(1, 32))
    labels[1] = IGNORED
    with pytest.raises(ValueError, match=r"labels per prompt are \[4, 0\]"):
        label_nll(llama, source, labels, torch.zeros(1, 32))


def test_clean_prompt_vector_on_texts_held_out(llama, tokenizer):
    # Every text is there four times, so that those held out resemble those learned from.
    method = CleanPromptVector(source_layer=1, target_layer=4, radii=(0.6, 0.01, 0.3))
    vectors = method(llama, tokenizer, TEXTS * 4, torch.Generator().manual_seed(0))
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0)).tolist()
    held_out = [(TEXTS * 4)[index] for index in order[:8]]
    assert vectors.scores["nll"] == pytest.approx([plain_nll(llama, tokenizer, held_out, vectors.theta[0])], rel=1e-4)
    unsteered = plain_nll(llama, tokenizer, held_out, torch.zeros(32))
    assert vectors.scores["nll_unsteered"] == pytest.approx([unsteered], rel=1e-4)
    assert vectors.scores["nll"][0] < unsteered - 0.2  # it saves 0.4, random vectors nothing
    assert len(vectors) == 1 and vectors.radius == 0.6  # the texts are far from what the model writes
    unit = mean_norm(cache_source(llama, Prompts.from_chat(llama, tokenizer, TEXTS), 1))
    torch.testing.assert_close(vectors.theta.norm(), torch.tensor(0.6 * unit))
    again = method(llama, tokenizer, TEXTS * 4, torch.Generator().manual_seed(0))
    assert torch.equal(again.theta, vectors.theta)


def test_held_out_texts_choose_the_radius(llama, tokenizer):
    held_out = torch.randperm(4, generator=torch.Generator().manual_seed(0)).tolist()[0]
    texts = ["w10 w11 w12"] * 4
    # Made likely at the cost of these tokens, the texts learned from want a radius that hurts the one held out.
    texts[held_out] = "w40 w41 w42 w43 w44 w45"

    def learn(*radii):
        method = CleanPromptVector(source_layer=1, target_layer=4, radii=radii)
        return method(llama, tokenizer, texts, torch.Generator().manual_seed(0))

    seen = [text for index, text in enumerate(texts) if index != held_out]
    small, large = learn(0.02), learn(0.8)
    assert plain_nll(llama, tokenizer, seen, large.theta[0]) < plain_nll(llama, tokenizer, seen, small.theta[0]) - 0.1
    assert small.scores["nll"][0] < large.scores["nll"][0]
    assert learn(0.8, 0.02).radius == 0.02


def test_labels_are_the_message_and_the_token_that_ends_it(tokenizer):
    prompts, labels = labelled_texts(tokenizer, ["w5 w6", "w7"])
    assert prompts.input_ids.tolist() == [[1, 5, 6], [0, 1, 7]]
    assert labels.tolist() == [[5, 6, END], [IGNORED, 7, END]]
    tokenizer.chat_template = "{% for m in messages %}<s> {{ m['content'] }}w9 {% endfor %}"
    prompts, labels = labelled_texts(tokenizer, ["w5 w6"])  # w6 and w9 become one token, the unknown one
    assert prompts.input_ids.tolist() == [[1, 5]] and labels.tolist() == [[5, 3]]


def test_the_message_stands_between_what_the_template_writes(tokenizer):
    assert round_user(tokenizer)[0] == "<s> "
    shipped = load_tokenizer(BASE)
    assert round_user(shipped)[0] == "<|bos|><|user|>"
    text = "Name three fruits."
    prompts, labels = labelled_texts(shipped, [text])
    opening = shipped("<|bos|><|user|>", add_special_tokens=False)["input_ids"]
    assert prompts.input_ids[0].tolist()[: len(opening)] == opening
    labelled = labels[0][labels[0] != IGNORED].tolist()
    assert shipped.decode(labelled) == text + "<|end|>"
    assert labels[0].tolist()[:-1] == [IGNORED] * (len(opening) - 1) + prompts.input_ids[0].tolist()[len(opening) :]


def test_templates_that_do_not_keep_the_message_apart(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}<s>w9{{ m['content'] }} {% endfor %}"
    with pytest.raises(ValueError, match="the tokens of the chat template's opening '<s>w9' change when '5' follows"):
        labelled_texts(tokenizer, ["5"])
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    assert labelled_texts(tokenizer, ["w5"])[0].input_ids[0, 0] == tokenizer.bos_token_id  # as a document begins
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="puts nothing before the user's message"):
        labelled_texts(tokenizer, ["w5"])
    for shown in (0, 2):
        tokenizer.chat_template = "<s> " + "{% for m in messages %}{{ m['content'] }} {% endfor %}" * shown
        with pytest.raises(ValueError, match=f"shows the user's message {shown} times"):
            round_user(tokenizer)


def test_bad_settings_are_named(llama, tokenizer, generator):
    with pytest.raises(ValueError, match="source layer 2 is not before target layer 2"):
        CleanPromptVector(source_layer=2, target_layer=2)
    with pytest.raises(ValueError, match="radii are"):
        CleanPromptVector(source_layer=1, target_layer=2, radii=())
    with pytest.raises(ValueError, match="held_out is 1.0"):
        CleanPromptVector(source_layer=1, target_layer=2, held_out=1.0)
    with pytest.raises(ValueError, match="target layer is 7 but the model has 4 layers"):
        CleanPromptVector(source_layer=1, target_layer=7)(llama, tokenizer, TEXTS, generator)
    with pytest.raises(ValueError, match="got 1 texts"):
        CleanPromptVector(source_layer=1, target_layer=4)(llama, tokenizer, TEXTS[:1], generator)
    with pytest.raises(ValueError, match="bisections is -1"):
        SupervisedVector(source_layer=1, target_layer=4, bisections=-1)


def test_bisection_finds_a_smaller_radius_that_still_elicits(llama, tokenizer):
    prompts = Prompts.from_ids([[5, 6, 7, 8], [9, 10, 11]])
    unit = mean_norm(cache_source(llama, prompts, 1))
    written = (
        complete_ids(llama, tokenizer, prompts, max_new_tokens=1, vectors=2 * unit * theta, layer=1).flatten().tolist()
        for theta in random_directions(100, 32, torch.Generator().manual_seed(3))
    )
    plain = complete_ids(llama, tokenizer, prompts, max_new_tokens=1).flatten().tolist()
    target = next(row[:1] for row in written if row[0] == row[1] and row[0] not in plain)
    radii = (0.001, 2.0)  # the smaller changes no answer; at the larger some vector elicits, by construction

    def learn(bisections, radii=radii):
        method = SupervisedVector(source_layer=1, target_layer=4, radii=radii, steps=30, bisections=bisections)
        return method(llama, prompts, target, torch.Generator().manual_seed(0))

    coarse, fine = learn(0), learn(6)
    assert coarse.radius == 2.0 and fine.radius < coarse.radius
    assert fine.scores["elicits"] == [1.0]
    assert elicits(llama, prompts, 1, fine.theta, torch.tensor(target)).tolist() == [1.0]
    torch.testing.assert_close(fine.theta.norm(), torch.tensor(fine.radius * unit))
    # Six halvings of log(2 / 0.001) leave a factor of 1.13 between what elicits and what fails.
    assert learn(0, radii=(fine.radius / (2000 ** (1 / 64) * 1.01),)).scores["elicits"][0] < 0.9
    # Nothing fails below the only radius, or nothing elicits: the grid decides.
    assert learn(6, radii=(2.0,)).radius == 2.0
    assert learn(6, radii=radii[:1]).radius == 0.001
