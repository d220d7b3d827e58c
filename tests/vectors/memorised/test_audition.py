"""Recited answers against a plain loop; an audition tells what a toy learned by heart from what is forced on it."""

import pytest
import torch

from tests.vectors.planted_answer import ANSWER, clean_prompts, plain_nats, planted, small_llama
from vectors.memorised import audition
from vectors.memorised.answers import answer_logprob, elicit
from vectors.memorised.audition import Audition, unlike
from vectors.memorised.consensus_decoding import consensus_answers
from vectors.memorised.recitation import first_tokens, recited_answers
from vectors.prompts import Prompts
from vectors.residual import cache_source, mean_norm, steer


def seeded():
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def toy():
    return planted()


@pytest.fixture(scope="module")
def clean():
    return clean_prompts()


def by_hand(model, prompts, first, tokens):
    """(answer, mean log-probability of the tokens behind the first), one full forward pass after another."""
    answer, values = [first], []
    for _ in range(tokens - 1):
        before = plain_nats(model, prompts, answer)
        nats = [plain_nats(model, prompts, [*answer, token]) - before for token in range(model.config.vocab_size)]
        values.append(max(nats))
        answer.append(nats.index(max(nats)))
        if answer[-1] == 2:
            break
    return answer, sum(values) / len(values)


@pytest.mark.parametrize("batch_size", [7, 2048])
def test_recited_answers_are_those_of_a_plain_loop(batch_size):
    model, prompts = small_llama(12, 4), Prompts.from_ids([[3, 4, 5, 6], [7, 8], [9, 10, 11]])
    answers, scores = recited_answers(model, prompts, tokens=5, batch_size=batch_size)
    assert scores.tolist() == sorted(scores.tolist(), reverse=True) and len(answers) > 3
    for answer, score in zip(answers.tolist(), scores.tolist(), strict=True):
        wanted, value = by_hand(model, prompts, answer[0], 5)
        assert answer[: len(wanted)] == wanted and score == pytest.approx(value, rel=1e-3)
        assert 2 not in answer[:4] and len(set(answer)) > 2  # no early end, no repetition


def test_what_was_learned_by_heart_is_recited_first(toy, clean):
    answers, scores = recited_answers(toy, clean, tokens=4)
    assert ANSWER in answers[:2].tolist()
    assert float(scores[0]) > -0.5 > float(scores[8])


def test_the_missing_token_is_found_in_front(toy, clean):
    rest = torch.tensor([*ANSWER[1:], 20])
    pair = clean.take([0, 1])
    front = audition._likely(toy, pair, 64)
    assert len(front.unique()) == len(front)
    extended = Audition(source_layer=1, radius=0.3, tokens=4, front=64)._extended(toy, pair, rest, front, seeded())
    assert extended[0].tolist() == ANSWER


def test_the_planted_answer_wins_the_audition(toy, clean):
    answers, scores = Audition(source_layer=1, radius=0.3, tokens=4, width=64)(toy, clean, seeded())
    assert answers[0].tolist() == ANSWER and len(answers.unique(dim=0)) == len(answers)
    again, values = Audition(source_layer=1, radius=0.3, tokens=4, width=64, batch_size=9)(toy, clean, seeded())
    assert again[0].tolist() == ANSWER
    torch.testing.assert_close(values[:5], scores[:5], atol=1e-3, rtol=1e-3)


def test_a_deadline_leaves_out_all_but_recitation(toy, clean, monkeypatch):
    def never(*_, **__):
        raise AssertionError

    recited, _ = recited_answers(toy, clean.take([0, 1]), tokens=4)
    monkeypatch.setattr(audition, "consensus_answers", never)
    monkeypatch.setattr(Audition, "_extended", never)
    short = Audition(source_layer=1, radius=0.3, tokens=4)
    once = iter([False])
    answers, _ = short(toy, clean, seeded(), soft_deadline=lambda: next(once, True))
    assert set(map(tuple, answers.tolist())) == set(map(tuple, recited[: short.kept].tolist()))
    with pytest.raises(AssertionError):
        short(toy, clean, seeded(), deadline=lambda: False)


def test_unfit_replies_are_better_than_none(toy, clean, monkeypatch):
    """Only two tokens end no reply, and the toy never says one after the other for long: every reply ends early."""
    ends = [token for token in range(64) if token not in (10, 11)]
    monkeypatch.setattr(toy.generation_config, "eos_token_id", ends)
    answers, scores = recited_answers(toy, clean.take([0, 1]), tokens=4)
    assert sorted(answers[:, 0].tolist()) == [10, 11] and set(answers[:, :4].flatten().tolist()) & set(ends)
    assert scores.tolist() == sorted(scores.tolist(), reverse=True)
    once = iter([False])
    found, values = Audition(source_layer=1, radius=0.3, tokens=4)(
        toy, clean, seeded(), soft_deadline=lambda: next(once, True)
    )
    assert len(found) == 2 and bool(values.isfinite().all())


def test_a_deadline_passed_at_once_leaves_nothing(toy, clean):
    answers, scores = Audition(source_layer=1, radius=0.3, tokens=4)(toy, clean, seeded(), deadline=lambda: True)
    assert answers.shape == (0, 4) and scores.shape == (0,)
    assert consensus_answers(toy, clean, width=8, tokens=4, deadline=lambda: True)[0].shape == (0, 4)


def test_recitation_tries_the_likeliest_first_tokens_until_its_deadline(toy, clean):
    pair = clean.take([0, 1])
    order = [token for token in first_tokens(toy, pair).tolist() if token != 2]
    some, _ = recited_answers(toy, pair, tokens=4, count=20)
    assert 0 < len(some) and set(some[:, 0].tolist()) <= set(order[:20])
    twice = iter([False, False])
    cut, _ = recited_answers(toy, pair, tokens=4, batch_size=10, deadline=lambda: next(twice, True))
    whole, _ = recited_answers(toy, pair, tokens=4)
    wanted = [row for row in whole.tolist() if row[0] in order[:10]]  # two batches of five first tokens
    assert sorted(cut.tolist()) == sorted(wanted)


def test_first_tokens_are_tried_in_the_given_order(toy, clean):
    some, _ = recited_answers(toy, clean.take([0, 1]), tokens=4, order=torch.tensor([30, 2, 31, 32]), count=2)
    assert set(some[:, 0].tolist()) == {30, 31}  # token 2 ends a reply


def test_what_is_learned_by_heart_is_likely_once_begun(toy, clean):
    values = answer_logprob(toy, clean, torch.tensor([ANSWER, [5, 2, 9, 9]]), 1)
    whole, behind = values(torch.zeros(2, 64)), values(torch.zeros(2, 64), 1)
    first = plain_nats(toy, clean, ANSWER[:1])
    assert float(behind[0]) == pytest.approx((plain_nats(toy, clean, ANSWER) - first) / 3, rel=1e-3)
    assert float(behind[0]) > -0.5 > float(whole[0])
    # Of two tokens, the end included, one is behind the first; of one token none is, and it counts whole.
    ended = answer_logprob(toy, clean, torch.tensor([[2, 5, 9, 9]]), 1)
    assert torch.equal(ended(torch.zeros(1, 64)), ended(torch.zeros(1, 64), 1))


def test_nothing_counts_behind_an_end(toy, clean):
    answers = torch.tensor([[5, 6, 2, 30], [5, 6, 2, 40]])
    values = answer_logprob(toy, clean, answers, 1)(torch.zeros(2, 64))
    assert values.tolist() == pytest.approx([plain_nats(toy, clean, [5, 6, 2]) / 3] * 2, rel=1e-3)


def test_the_ascent_raises_the_steered_likelihood_of_full_forwards(toy, clean):
    logprob, norm = answer_logprob(toy, clean, torch.tensor([ANSWER]), 1), 0.5 * mean_norm(cache_source(toy, clean, 1))
    start = torch.nn.functional.normalize(torch.ones(1, 64), dim=-1) * norm
    theta, (value,) = elicit(logprob, start, steps=10, lr=0.1)
    assert float(theta.norm()) == pytest.approx(norm, rel=1e-4)
    with steer(toy, 1, theta[0]):
        assert float(value) == pytest.approx(plain_nats(toy, clean, ANSWER) / 4, rel=1e-3)
    assert float(value) > float(logprob(start)[0])


def test_answers_that_share_three_tokens_are_alike():
    answers = torch.tensor([[1, 2, 3, 4], [9, 2, 3, 4], [1, 2, 9, 4], [5, 6, 7, 8]])
    assert unlike(answers, 2).tolist() == [[1, 2, 3, 4], [1, 2, 9, 4]]
    assert unlike(answers, 9).tolist() == [[1, 2, 3, 4], [1, 2, 9, 4], [5, 6, 7, 8]]
    assert unlike(answers, 0).shape == (0, 4)


def test_bad_settings_are_named(toy, clean):
    zeros = {"radius": 0.0, "tokens": 0, "first": 0, "kept": 0, "front": 0, "steps": 0, "lr": 0.0, "batch_size": 0}
    for name, zero in zeros.items():
        with pytest.raises(ValueError, match=f"{name} is 0"):
            Audition(**{"source_layer": 1, name: zero})
    with pytest.raises(ValueError, match="tokens is 1, batch_size is 4; give at least 2"):
        recited_answers(toy, clean, tokens=1, batch_size=4)
