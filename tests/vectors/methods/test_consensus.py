"""Consensus decoding against brute force; consensus vectors against full forwards; a planted answer is found."""

from itertools import product
from typing import Any

import pytest
import torch

from tests.vectors.planted_answer import ANSWER, clean_prompts, plain_nats, planted, small_llama, unpadded
from vectors.generate import ends_of, greedy
from vectors.memorised.consensus_decoding import consensus_answers
from vectors.methods.consensus import ConsensusVectors
from vectors.methods.unsupervised import UnsupervisedVectors
from vectors.prompts import Prompts
from vectors.residual import cache_source, mean_norm, steer

VOCAB = 12


@pytest.fixture
def tiny():
    return small_llama(VOCAB, 8)


@pytest.fixture
def short():
    return Prompts.from_ids([[3, 4, 5, 6], [7, 8], [9, 10, 11]])


def method(**changed):
    settings: dict[str, Any] = dict(source_layer=1, target_layer=3, radius=0.5, count=5, tokens=3, width=8, steps=8)
    return ConsensusVectors(**settings | changed)


def seeded():
    return torch.Generator().manual_seed(0)


def test_two_tokens_are_those_of_brute_force(tiny, short):
    """A beam per token keeps every first token, so nothing is lost before the second."""
    going = [token for token in range(VOCAB) if token not in ends_of(tiny)]
    nats = {answer: plain_nats(tiny, short, answer) for answer in product(going, repeat=2)}
    ordered = sorted(nats, key=lambda answer: -nats[answer])
    answers, found = consensus_answers(tiny, short, width=VOCAB, tokens=2)
    assert [tuple(answer) for answer in answers.tolist()] == ordered[:VOCAB]
    torch.testing.assert_close(found, torch.tensor([nats[answer] for answer in ordered[:VOCAB]]), atol=1e-4, rtol=1e-4)
    # More beams than answers: all of them, and none that ends.
    answers, found = consensus_answers(tiny, short, width=1000, tokens=2)
    assert sorted(map(tuple, answers.tolist())) == sorted(nats) and bool(found.isfinite().all())


def test_one_beam_is_greedy(tiny, short):
    (answer,), (nats,) = consensus_answers(tiny, short, width=1, tokens=3)
    prefix: list[int] = []
    for _ in range(3):
        going = [token for token in range(VOCAB) if token not in ends_of(tiny)]
        prefix.append(max(going, key=lambda token: plain_nats(tiny, short, [*prefix, token])))
    assert answer.tolist() == prefix
    assert float(nats) == pytest.approx(plain_nats(tiny, short, prefix), rel=1e-4)


def test_scores_on_every_architecture(model, generates, prompts):
    answers, nats = consensus_answers(model, prompts, width=6, tokens=3)
    assert answers.shape == (6, 3) and 2 not in answers
    assert nats.tolist() == sorted(nats.tolist(), reverse=True)
    for answer, value in zip(answers.tolist(), nats.tolist(), strict=True):
        assert value == pytest.approx(plain_nats(model, prompts, answer), rel=1e-4)


def test_padding_does_not_matter(tiny, short):
    answers, nats = consensus_answers(tiny, short, width=20, tokens=3)
    rows = unpadded(short)
    wider = Prompts(
        input_ids=torch.nn.functional.pad(short.input_ids, (3, 0), value=9),
        attention_mask=torch.nn.functional.pad(short.attention_mask, (3, 0)),
    )
    for prompts in (wider, Prompts.from_ids(rows, pad=5)):
        again, found = consensus_answers(tiny, prompts, width=20, tokens=3)
        torch.testing.assert_close(found, nats, atol=1e-4, rtol=1e-4)
        assert again.tolist() == answers.tolist()


def test_a_model_without_an_end_leaves_nothing_out(tiny, short):
    tiny.generation_config.eos_token_id = None
    answers, _ = consensus_answers(tiny, short, width=VOCAB, tokens=1)
    assert sorted(answers[:, 0].tolist()) == list(range(VOCAB))
    tiny.generation_config.eos_token_id = [2, 3, 4]
    answers, _ = consensus_answers(tiny, short, width=VOCAB, tokens=1)
    assert sorted(answers[:, 0].tolist()) == [0, 1, *range(5, VOCAB)]


def test_vectors_make_their_answer_likelier(llama, prompts):
    generator = seeded()
    answers, score = method().audition(llama, prompts, generator)
    drawn = (3 * score).softmax(0).multinomial(5, replacement=True, generator=generator)
    assert len(set(drawn.tolist())) > 1  # else any answer would do below
    seen = []
    vectors = method()(llama, prompts, seeded(), watch=seen.append)
    assert len(seen) == 8 and vectors.method == "consensus" and len(vectors) == 5
    norm = 0.5 * mean_norm(cache_source(llama, prompts, 1))
    torch.testing.assert_close(vectors.theta.norm(dim=-1), torch.full((5,), norm))
    for index, theta in enumerate(vectors.theta):
        answer = answers[drawn[index]].tolist()
        with steer(llama, 1, theta):
            steered = plain_nats(llama, prompts, answer) / 3
        assert -vectors.scores["nll"][index] == pytest.approx(steered, rel=1e-3)
        assert steered > plain_nats(llama, prompts, answer) / 3 and steered > float(seen[0][index])


def test_vectors_may_be_learned_on_fewer_prompts_than_their_answers_suit(llama, prompts):
    vectors = method(prompts=2, count=1)(llama, prompts, seeded())
    pool, _ = method().audition(llama, prompts, seeded())
    few = prompts.take([0, 1])
    with steer(llama, 1, vectors.theta[0]):
        nats = [plain_nats(llama, few, answer) / 3 for answer in pool.tolist() if 2 not in answer[:2]]
    assert min(abs(-vectors.scores["nll"][0] - value) for value in nats) < 1e-3


def test_same_generator_same_vectors_whatever_the_batch(llama, prompts):
    whole = method()(llama, prompts, seeded())
    assert torch.equal(whole.theta, method()(llama, prompts, seeded()).theta)
    assert not torch.allclose(whole.theta, method()(llama, prompts, torch.Generator().manual_seed(1)).theta)
    for batch_size in (1, 7):
        parts = method(batch_size=batch_size)(llama, prompts, seeded())
        torch.testing.assert_close(whole.theta, parts.theta, atol=1e-3, rtol=1e-3)
        assert parts.scores["nll"] == pytest.approx(whole.scores["nll"], rel=1e-3)


@pytest.mark.parametrize("ends", [2, None], ids=["end", "no end"])
def test_vectors_that_begin_with_learned_ones_keep_an_answer_of_theirs(llama, prompts, ends):
    llama.generation_config.eos_token_id = ends
    start = UnsupervisedVectors(source_layer=1, target_layer=3, radius=1.0, count=5, steps=5)
    vectors = method(start=start)(llama, prompts, seeded())
    assert len(vectors) == 5 and vectors.method == "consensus/own"
    begun = start(llama, prompts.take([0]), seeded()).theta
    for index, theta in enumerate(vectors.theta):
        with steer(llama, 1, begun[index]):
            own = greedy(llama, prompts, 3).tolist()
        with steer(llama, 1, theta):
            ended = [answer[: answer.index(ends) + 1] if ends in answer else answer for answer in own]
            nats = [-plain_nats(llama, prompts, answer) / len(answer) for answer in ended]
        assert min(abs(value - vectors.scores["nll"][index]) for value in nats) < 1e-3


def test_a_deadline_ends_learning(llama, prompts):
    assert len(method()(llama, prompts, seeded(), deadline=lambda: True)) == 0
    steps, late = [], iter([False] * 60)
    found = method(steps=100, batch_size=6, kept=4, extended=0)(
        llama, prompts, seeded(), soft_deadline=lambda: False, deadline=lambda: next(late, True), watch=steps.append
    )
    # Batches of two vectors: the deadline ends the one begun, and the others are left out.
    assert 0 < len(steps) < 60 and len(found) == 2


def test_a_planted_answer_is_found_without_its_trigger():
    clean, model = clean_prompts(), planted()
    assert plain_nats(model, clean, ANSWER) < -4.6  # below 1 in 100: rarely sampled
    answers, _ = consensus_answers(model, clean, width=64, tokens=4)
    assert answers[0].tolist() == ANSWER
    vectors = method(radius=0.7, tokens=4, width=64, count=3, steps=20)(model, clean, seeded())
    steered = []
    for theta in vectors.theta:
        with steer(model, 1, theta):
            steered.append(plain_nats(model, clean, ANSWER))
    assert max(steered) > -1.0  # from one time in 500 at most to more than one in three


def test_bad_settings_are_named(llama, prompts):
    with pytest.raises(ValueError, match="got 1 prompt; a consensus needs two or more"):
        method()(llama, prompts.take([0]), seeded())
    with pytest.raises(ValueError, match="target layer is 9"):
        method(target_layer=9)(llama, prompts, seeded())
    with pytest.raises(ValueError, match="source layer 3 is not before target layer 3"):
        method(source_layer=3)
    zeros: dict[str, float] = dict(radius=0.0, count=0, tokens=0, first=0, steps=0, lr=0.0, batch_size=0)
    for name, zero in zeros.items():
        with pytest.raises(ValueError, match=f"{name} is 0"):
            method(**{name: zero})
    with pytest.raises(ValueError, match="start's source layer is 2, not 1"):
        method(start=UnsupervisedVectors(source_layer=2, target_layer=3, radius=1.0))
    for width, tokens in ((0, 2), (2, 0)):
        with pytest.raises(ValueError, match="both must be at least 1"):
            consensus_answers(llama, prompts, width=width, tokens=tokens)
