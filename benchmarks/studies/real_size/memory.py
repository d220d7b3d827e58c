"""Peak memory of one GCG step by target likelihood and one by delta cosine at half depth, on models of real size.

    python -m benchmarks.studies.real_size.memory --model gemma3
    python -m benchmarks.studies.real_size.memory --model smollm2 --random-layers 16 --vocabulary 128256

The second is a model of random weights in the shape of Llama 3.2 1B. Exit status 1 where the peak is above the limit.
"""

import resource
import sys
from dataclasses import dataclass

import torch
import tyro

from attacks.objectives.delta_cosine import DeltaCosine
from attacks.objectives.target_nll import TargetNLL
from attacks.scoring.engine import Engine
from attacks.scoring.problem import Problem
from attacks.searchers.gcg import GCG
from benchmarks.organisms import zoo
from benchmarks.studies.real_size.models import loaded, random_vectors


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What is run, and how much it may take."""

    model: str = "gemma3"
    """An organism, or a pretrained base that was fetched: smollm2 or gemma3."""
    random_layers: int | None = None
    """Layers of a random-weights model of 1B shape in the model's place; None: the model itself."""
    vocabulary: int | None = None
    """Embeddings of the random-weights model; None: as many as the model has."""
    prompts: int = 4
    """Prompts that every candidate is scored on."""
    search_width: int = 128
    """Candidates per step."""
    trigger_length: int = 5
    """Tokens in the slot."""
    limit: float = 12.0
    """Peak memory of the process that is allowed, in GiB."""


def main(memory: Memory) -> int:
    """Prints the peak after loading and after each step; returns the exit status."""
    torch.set_num_threads(1)
    try:
        model, tokenizer, _, behaviour = loaded(memory.model, memory.random_layers, memory.vocabulary)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"loaded, {model.num_parameters() / 1e6:,.0f} million parameters in {model.dtype}: {peak():.2f} GiB", flush=True
    )
    texts = zoo.text_split().search[: memory.prompts]
    engine = Engine(model, Problem.from_chat(model, tokenizer, texts, memory.trigger_length))
    vectors = random_vectors(model, engine.layers // 4)
    target = tokenizer(behaviour, add_special_tokens=False)["input_ids"]
    objectives = {
        "target likelihood": TargetNLL(target_ids=target),
        "delta cosine at half depth": DeltaCosine.from_vectors(engine, vectors, [engine.layers // 2]),
    }
    for name, objective in objectives.items():
        gcg = GCG(steps=1, search_width=memory.search_width, topk=128)
        gcg(engine, objective, torch.Generator().manual_seed(0))
        print(f"a step by {name}: {peak():.2f} GiB", flush=True)
    return int(peak() > memory.limit)


def peak() -> float:
    """The most memory that this process has taken so far, in GiB (Linux counts in kibibytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Memory)))
