"""What a GPU does differently: the losses and gradients of the CPU, every part of `recover`, memory that ends."""

import pytest
import torch

from attacks.attack import ATTACKS
from attacks.objectives.delta_cosine import DeltaCosine
from attacks.objectives.target_nll import TargetNLL
from attacks.recover import recover
from attacks.scoring.budget import Budget
from attacks.scoring.engine import Engine
from attacks.scoring.problem import Problem
from attacks.searchers.candidates import random_triggers
from attacks.suspect import Suspect
from benchmarks.organisms import zoo
from vectors.methods.controls import random_directions
from vectors.steering import SteeringVectors, model_id

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.filterwarnings("default"),  # of packages as they are on the GPU's machine
]
TARGET = [5, 6, 7]


def on(device: str, prompts: int = 4):
    """Organism `word` in float32, its engine, and a likelihood and an activation objective."""
    organism = zoo.load("word", device)
    model = organism.model.float()
    problem = Problem.from_chat(model, organism.tokenizer, organism.prompts.search[:prompts], 3)
    engine = Engine(model, problem)
    vectors = SteeringVectors(
        theta=random_directions(1, model.config.hidden_size, torch.Generator().manual_seed(0)),
        source_layer=2,
        target_layer=engine.layers,
        radius=1.0,
        method="random",
        model_id=model_id(model),
    )
    return organism, engine, [TargetNLL(target_ids=TARGET), DeltaCosine.from_vectors(engine, vectors, [4, 6])]


def test_losses_and_gradients_are_those_of_the_cpu():
    _, cpu, objectives = on("cpu")
    _, gpu, on_gpu = on("cuda")
    candidates = random_triggers(cpu.problem.permitted(3), 40, torch.Generator().manual_seed(0))
    for objective, other in zip(objectives, on_gpu, strict=True):
        torch.testing.assert_close(
            gpu.losses(other, candidates).cpu(), cpu.losses(objective, candidates), rtol=1e-3, atol=1e-3
        )
        (_, wanted), (_, gradient) = cpu.gradient(objective, candidates[:2]), gpu.gradient(other, candidates[:2])
        cosine = torch.cosine_similarity(gradient.cpu().flatten(), wanted.flatten(), dim=0)
        assert cosine > 0.999


def test_memory_that_ends_halves_the_batch():
    _, engine, (objective, _) = on("cuda")
    engine.batch_size = 4096
    candidates = random_triggers(engine.problem.permitted(3), 4096, torch.Generator().manual_seed(0))
    free, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(min(1.0, (total - free + 0.4e9) / total))
    try:
        losses = engine.losses(objective, candidates)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert engine.batch_size < 4096 and losses.isfinite().all()


@pytest.mark.parametrize("known", [True, False])
def test_recovers(known):
    organism = zoo.load("word", "cuda")
    found = recover(
        Suspect(model=organism.model, tokenizer=organism.tokenizer),
        ATTACKS["portfolio"],
        search=organism.prompts.search,
        select=organism.prompts.select,
        behaviour=organism.triggers[0][1] if known else None,
        budget=Budget(flops=1e13),
        generator=torch.Generator().manual_seed(0),
    )
    assert (found.trigger, found.verdict) == ("copper", "functional")
