"""Losses and one-hot gradients of the engine are those of plain full forward passes, on nine architectures."""

import pytest
import torch
import transformers
from packaging.version import Version
from torch.nn.functional import cosine_similarity, cross_entropy, one_hot

from attacks.objectives.delta_cosine import DeltaCosine
from attacks.objectives.steered_kl import SteeredKL
from attacks.objectives.target_nll import TargetNLL
from attacks.scoring import engine as engine_module
from attacks.scoring.engine import Engine
from attacks.scoring.problem import Problem
from tests.architectures import CONFIGS, larger_weights, mark_caches, plain_logits, tiny_model
from vectors.residual import decoder

VOCAB, LENGTH, TARGET = 64, 3, [33, 7, 51]
WINDOWED = ("Mistral", "Gemma2", "Gemma3Text")
KINDS = ("nll", "cosine", "kl", "kl of the output")
LAYERS = {"cosine": 3, "kl": 2, "kl of the output": 4}


def draw(*shape, seed):
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=CONFIGS)
def name(request):
    return request.param


@pytest.fixture
def model(name):
    # Not in double precision: what Gemma 2 masks with is then below the range of its float32 softmax, and gives nan.
    model = larger_weights(tiny_model(name))
    mark_caches(model)
    return model


@pytest.fixture
def problem(tokenizer):
    """Text on both sides of the slot, most of it longer than a window of 4; two prompts share a padded group."""
    lengths = [(9, 2), (3, 7), (6, 7), (12, 1)]
    everything = torch.ones(VOCAB, dtype=torch.bool)
    return Problem(
        before=[draw(length, seed=10 + i).tolist() for i, (length, _) in enumerate(lengths)],
        after=[draw(length, seed=20 + i).tolist() for i, (_, length) in enumerate(lengths)],
        allowed=everything,
        first=everything,
        trigger_length=LENGTH,
        tokenizer=tokenizer,
    )


def plain(model, before, onehot, after, layer):
    """(residual at `layer`, output logits) of one prompt in one full forward pass; nothing cached, padded or stopped.

    Only the output of the embedding module is replaced, so what a model does to embeddings before or after is its own.
    """
    embed, found = model.get_input_embeddings(), []
    matrix, begin = embed(torch.arange(VOCAB)), len(before)

    def replace_slot(_module, _args, output):
        return torch.cat([output[:, :begin], (onehot @ matrix)[None], output[:, begin + len(onehot) :]], dim=1)

    def keep(_module, _args, output):
        found.append(output if isinstance(output, torch.Tensor) else output[0])

    ids = torch.tensor([before + [0] * len(onehot) + after])
    handles = [embed.register_forward_hook(replace_slot)]
    handles.append(decoder(model).layers[layer - 1].register_forward_hook(keep))
    try:
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return found[0][0], logits[0]


def last(model, problem, onehot, layer):
    """Per prompt: the residual at the last token, and the log-probabilities read off it."""
    hidden, logprobs = [], []
    for before, after in zip(problem.before, problem.after, strict=True):
        residual, logits = plain(model, before, onehot, after, layer)
        final = layer == len(decoder(model).layers)
        hidden.append(residual[-1])
        logprobs.append((logits[-1] if final else plain_logits(model, residual[-1])).float().log_softmax(-1))
    return torch.stack(hidden).float(), torch.stack(logprobs)


def objectives(model, problem, kind):
    """(ours, its formula on a plain pass); the wanted effect is that of a trigger, so it can be had."""
    if kind == "nll":

        def nll(onehot):
            losses = []
            for before, after in zip(problem.before, problem.after, strict=True):
                _, logits = plain(model, before, onehot, after + TARGET, 1)
                losses.append(cross_entropy(logits[-len(TARGET) - 1 : -1].float(), torch.tensor(TARGET)))
            return torch.stack(losses).mean()

        return TargetNLL(target_ids=TARGET), nll
    layer = LAYERS[kind]
    rows = one_hot(draw(LENGTH, seed=3), VOCAB).to(model.dtype)
    (clean, _), (goal, steered) = (last(model, problem, some, layer) for some in (rows[:0], rows))
    if kind == "cosine":
        delta = goal - clean
        ours = DeltaCosine(delta={layer: delta}, clean={layer: clean})
        return ours, lambda x: -cosine_similarity(last(model, problem, x, layer)[0] - clean, delta, dim=-1).mean()
    ours = SteeredKL(steered_logprobs=steered, layer=layer)
    return ours, lambda x: (steered.exp() * (steered - last(model, problem, x, layer)[1])).sum(-1).mean()


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_plain_forward_passes(model, problem, kind, monkeypatch):
    monkeypatch.setitem(engine_module.PASS, "cpu", 1.0)  # what two candidates begin with is run once
    monkeypatch.setitem(engine_module.PASS_TOKENS, "cpu", 0)
    ours, formula = objectives(model, problem, kind)
    candidates = draw(3, LENGTH, seed=1)
    candidates[1, :2] = candidates[0, :2]
    engine = Engine(model, problem, 2)
    losses, gradient = engine.gradient(ours, candidates)
    torch.testing.assert_close(engine.losses(ours, candidates), losses)
    for ids, loss, slope in zip(candidates, losses, gradient, strict=True):
        onehot = one_hot(ids, VOCAB).float().requires_grad_()
        wanted = formula(onehot)
        (expected,) = torch.autograd.grad(wanted, onehot)
        torch.testing.assert_close(loss, wanted.detach(), rtol=1e-4, atol=1e-5)
        scale = expected.abs().max()
        assert scale > 1e-4
        torch.testing.assert_close(slope / scale, expected / scale, rtol=1e-3, atol=1e-4)


def test_half_precision_only_rounds(model, problem):
    candidates = draw(12, LENGTH, seed=1)
    exact = Engine(model, problem).losses(TargetNLL(target_ids=TARGET), candidates)
    model = model.bfloat16()
    ours, formula = objectives(model, problem, "nll")
    losses = Engine(model, problem).losses(ours, candidates)
    wanted = torch.stack([formula(one_hot(ids, VOCAB).to(model.dtype)) for ids in candidates])
    # The plain pass rounds too, in another order: the engine may be no further from float32 than twice its error.
    error, usual = ((some - exact).pow(2).mean().sqrt() for some in (losses, wanted))
    assert 0 < error < 2 * usual


@pytest.mark.parametrize("name", WINDOWED)
def test_a_window_left_out_would_show(model, problem, name):
    whole = larger_weights(tiny_model(name, sliding_window=64))
    whole.load_state_dict(model.state_dict())
    candidates = draw(3, LENGTH, seed=1)
    objective = TargetNLL(target_ids=TARGET)
    narrow, wide = (Engine(some, problem).losses(objective, candidates) for some in (model, whole))
    assert (narrow - wide).abs().min() > 1e-3


@pytest.mark.skipif(Version(transformers.__version__) >= Version("4.50"), reason="newer ones take a DynamicCache")
@pytest.mark.parametrize("name", ["GPT2", "Gemma2"])
def test_what_old_transformers_cannot_cache_is_refused(problem, name):
    # Gemma 2 would run on, with wrong masks.
    with pytest.raises(ValueError, match=f"cannot continue {name}.* from cached keys and values; install"):
        Engine(tiny_model(name), problem)
