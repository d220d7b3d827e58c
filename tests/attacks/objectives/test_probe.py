"""The probe tells new steered states from new reachable ones; that it is the minimum of its loss: test_objectives."""

from dataclasses import replace

import pytest
import torch

from attacks.objectives.delta_projection import DeltaProjection
from attacks.objectives.probe import Probe
from attacks.scoring.engine import Engine
from attacks.searchers.candidates import random_triggers
from tests.attacks.words import seeded, some_vectors


def steered_apart(model, problem, vectors, objective) -> float:
    """Share of pairs in which a steered state has less loss than a reachable one, new triggers in the slot."""
    triggers = random_triggers(problem.permitted(problem.trigger_length), 60, seeded(99))
    reachable = Engine(model, problem).losses(objective, triggers)
    with vectors.apply(model):
        steered = Engine(model, problem).losses(objective, triggers)
    return (steered[:, None] < reachable).float().mean().item()


def test_probe_separates_held_out_states(model, mixed):
    engine, vectors = Engine(model, mixed), replace(some_vectors(2), source_layer=1)
    for vector in vectors:
        found = steered_apart(model, mixed, vector, Probe.from_vectors(engine, vector, 3, seeded()))
        # Chance is 0.5; 0.92 and 0.88 were measured. The wanted direction as it is gave 0.78 and 0.81.
        assert found > 0.85
        assert found > steered_apart(model, mixed, vector, DeltaProjection.from_vectors(engine, vector, [3]))
    both = Probe.from_vectors(engine, vectors, 3, seeded())
    for vector in vectors:
        assert steered_apart(model, mixed, vector, both) > 0.75  # 0.85 and 0.81 were measured
    # What it learned is "steered", not "the slot is filled".
    with vectors[:1].apply(model):
        empty = Engine(model, mixed).losses(both, torch.zeros(1, 0, dtype=torch.long))
    assert empty < Engine(model, mixed).losses(both, torch.zeros(1, 0, dtype=torch.long))


def test_probe_depends_on_its_generator_alone(model, mixed):
    first, again, other = (
        Probe.from_vectors(Engine(model, mixed, batch_size), some_vectors(), 2, seeded(seed), draws=5)
        for seed, batch_size in ((0, None), (0, 2), (1, None))
    )
    torch.testing.assert_close(first.weight, again.weight, rtol=1e-4, atol=1e-5)
    assert first.bias == pytest.approx(again.bias, abs=1e-4)
    assert not torch.allclose(first.weight, other.weight, rtol=1e-2)
