"""What the engine holds in memory: no copy of the embedding, pieces of logits, and batches that fit."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attacks.objectives.target_nll import TargetNLL
from attacks.scoring import engine as engine_module
from attacks.scoring.engine import Engine
from attacks.scoring.problem import Problem
from attacks.scoring.shared_prefix import keys_and_values
from tests.architectures import tiny_model
from tests.attacks.words import TARGET, random_candidates


def test_no_matrix_of_the_embedding_is_made(tokenizer):
    model, sizes = tiny_model("Gemma3Text"), []
    everything = torch.ones(64, dtype=torch.bool)
    sides = {"before": [[3, 4]], "after": [[5]], "trigger_length": 2}
    one = Problem(**sides, allowed=everything, first=everything, tokenizer=tokenizer)
    weight, objective = model.get_input_embeddings().weight, TargetNLL(target_ids=[7])

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (made,) if isinstance(t, torch.Tensor) and not function.is_view)
            return made

    with Sizes():
        engine = Engine(model, one)
        engine.gradient(objective, torch.tensor([[8, 9]]))
        engine.losses(objective, torch.tensor([[8, 9], [9, 8]]))
    assert 0 < max(sizes) < weight.numel()
    torch.testing.assert_close(engine.embedding, model.get_input_embeddings()(torch.arange(64)))
    assert Engine(model, one).embedded.weight is weight


def test_keys_and_values_of_candidates_are_not_kept(model, problem):
    prefix = Engine(model, problem)._groups[0].prefix
    assert prefix.layers is not None
    cache, stored = prefix.passing(3, 2), prefix.layers[0][0]
    new = torch.zeros(3 * prefix.rows, *stored.shape[1:]).to(stored)[:, :, :2]
    assert cache is not None
    keys, _ = cache.update(new, new, 0)
    # What a block sees is every prompt's prefix for every candidate, then what is new; what is held is the prefix once.
    assert torch.equal(keys, torch.cat([stored.repeat(3, 1, 1, 1), new], dim=2))
    assert torch.equal(keys_and_values(cache)[0][0], stored) and cache.get_seq_length() == stored.shape[2]


def test_default_batch_is_512_rows(model, problem, monkeypatch):
    assert Engine(model, problem).batch_size == 512 // 4
    monkeypatch.setitem(engine_module.ROWS, "cpu", 3)
    assert Engine(model, problem).batch_size == 1


# What a GPU raises, and what allocators of CPUs say on Linux and on Windows.
OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["gpu", "linux", "windows"])
@pytest.mark.parametrize("method", ["losses", "gradient", "elicits"])
def test_out_of_memory_halves_the_batch_and_remembers(model, mixed, monkeypatch, method, error):
    candidates, sizes, real = random_candidates(mixed, 10), [], Engine._suffix

    def limited(self, group, candidates, *args):
        sizes.append(len(candidates))
        if len(candidates) > 3:
            raise error
        return real(self, group, candidates, *args)

    def call(engine):
        what = TARGET if method == "elicits" else TargetNLL(target_ids=TARGET)
        arguments = (candidates, what) if method == "elicits" else (what, candidates)
        return getattr(engine, method)(*arguments)

    wanted = call(Engine(model, mixed))
    monkeypatch.setattr(Engine, "_suffix", limited)
    engine = Engine(model, mixed)
    groups = len(set(map(len, mixed.after)))
    torch.testing.assert_close(call(engine), wanted)
    # 10 and half of it fail in the first group; a part that fits runs in each.
    assert sizes == [10, 5] + [2] * 5 * groups and engine.batch_size == 2
    sizes.clear()
    torch.testing.assert_close(call(engine), wanted)
    assert sizes == [2] * 5 * groups


def test_what_does_not_fit_at_all_and_other_errors_are_raised(model, problem):
    for error, kind, message in (
        (OUT_OF_MEMORY[0], ValueError, "one candidate does not fit into memory; use fewer or shorter prompts"),
        (RuntimeError("shapes do not match"), RuntimeError, "shapes do not match"),
    ):

        def objective(*_, error=error):
            raise error

        with pytest.raises(kind, match=message):
            Engine(model, problem).losses(objective, random_candidates(problem, 5))


@pytest.mark.parametrize("rows", [1, 5])
def test_logits_made_in_pieces_give_the_same_losses_gradients_and_hits(model, mixed, monkeypatch, rows):
    candidates, target = random_candidates(mixed, 4), TargetNLL(target_ids=[300, 7, 12])
    engine = Engine(model, mixed)
    ids = [int(engine.logits(candidates[:1], 3)[0, 0].argmax())]
    wanted = engine.losses(target, candidates), *engine.gradient(target, candidates), engine.elicits(candidates, ids)
    sizes, whole = [], engine_module.unembed

    def watched(model, hidden):
        sizes.append(len(hidden))
        return whole(model, hidden)

    monkeypatch.setattr(engine_module, "unembed", watched)
    monkeypatch.setattr(engine_module, "PIECE", 4 * len(mixed.allowed) * rows)
    found = engine.losses(target, candidates), *engine.gradient(target, candidates), engine.elicits(candidates, ids)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
    assert max(sizes) == rows
