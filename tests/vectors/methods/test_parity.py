"""Objectives and their gradients on the batched slice equal those of one full forward pass per prompt and vector."""

import pytest
import torch

from tests.architectures import plain_logits
from vectors.methods.objectives import ChangeNorm, NormalizedChange, OutputKL, evaluate
from vectors.methods.unsupervised import steered_source
from vectors.residual import cache_source, decoder, embedding, mean_norm, run_slice

SOURCE, TARGET = 1, 3
OBJECTIVES = {
    "p2q1": ChangeNorm(),
    "p4q2": ChangeNorm(p=4.0, q=2.0),
    "p1q1": ChangeNorm(p=1.0),
    "normalised": NormalizedChange(),
    "steered||clean": OutputKL(tokens=2),
    "clean||steered": OutputKL(direction="clean||steered"),
    "some tokens": OutputKL(left_out=(0, 2, 7)),
}


def plain_forward(model, ids, theta=None):
    """Target-layer residual of one unpadded prompt in a full forward pass, by two hooks of its own."""
    layers, found = decoder(model).layers, []

    def add(_module, _args, output):
        first = output if isinstance(output, torch.Tensor) else output[0]
        first = first if theta is None else first + theta
        return first if isinstance(output, torch.Tensor) else (first, *output[1:])

    def keep(_module, _args, output):
        found.append(output if isinstance(output, torch.Tensor) else output[0])

    handles = [layers[SOURCE - 1].register_forward_hook(add), layers[TARGET - 1].register_forward_hook(keep)]
    try:
        model(input_ids=ids[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found[0][0]


def plain_objective(name, model, steered, clean):
    """The formulas as the papers print them, on one prompt."""
    last = list(zip(steered[-3:], clean[-3:], strict=True))
    if name in ("p2q1", "p4q2", "p1q1"):
        p, q = int(name[1]), int(name[3])
        return torch.stack([(s - c).norm() ** p for s, c in last]).sum() ** (1 / q)
    if name == "normalised":
        return torch.stack([(s / s.norm() - c / c.norm()).norm() ** 2 for s, c in last]).sum()
    tokens = 2 if name == "steered||clean" else 1
    first, second = (plain_logits(model, hidden[-tokens:]) for hidden in (steered, clean))
    if name == "some tokens":
        kept = [token for token in range(first.shape[-1]) if token not in (0, 2, 7)]
        first, second = first[:, kept], second[:, kept]
    first, second = first.log_softmax(-1), second.log_softmax(-1)
    p, q = (second, first) if name == "clean||steered" else (first, second)
    return (p.exp() * (p - q)).sum()


def plain_values(name, model, prompts, theta):
    """Every vector's objective, one prompt at a time; prompts without their padding."""
    rows = [ids[mask.bool()] for ids, mask in zip(prompts.input_ids, prompts.attention_mask, strict=True)]
    cleans = [plain_forward(model, ids) for ids in rows]
    pairs = list(zip(rows, cleans, strict=True))
    return torch.stack(
        [
            torch.stack([plain_objective(name, model, plain_forward(model, ids, one), clean) for ids, clean in pairs])
            for one in theta
        ]
    ).sum(1)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objective_and_gradient_are_those_of_full_forwards(model, prompts, name):
    if getattr(model.config, "final_logit_softcapping", None):
        model.config.final_logit_softcapping = 0.2  # at Gemma 2's 30 the logits of a random model are far from it
    source = cache_source(model, prompts, SOURCE)
    start = torch.randn(3, decoder(model).d_model, generator=torch.Generator().manual_seed(2)).to(embedding(model))
    start = mean_norm(source) * torch.nn.functional.normalize(start, dim=-1)
    with torch.no_grad():
        clean = run_slice(model, source, source.hidden, to=TARGET)

    ours = start.clone().requires_grad_()
    values = evaluate(OBJECTIVES[name], model, run_slice(model, source, steered_source(source, ours), to=TARGET), clean)
    values.sum().backward()
    plain = start.clone().requires_grad_()
    wanted = plain_values(name, model, prompts, plain)
    wanted.sum().backward()

    assert ours.grad is not None and plain.grad is not None
    # A KL of nearly equal distributions is a small difference of large numbers: the floor is float32's rounding.
    torch.testing.assert_close(values, wanted, rtol=1e-3, atol=1e-6)
    scale = float(plain.grad.abs().max())
    assert scale > 0
    torch.testing.assert_close(ours.grad / scale, plain.grad / scale, rtol=1e-3, atol=1e-3)


def test_no_gradient_at_no_vector(model, prompts):
    """At theta = 0 every objective has its minimum: 0, with gradient 0 and not nan."""
    source = cache_source(model, prompts, SOURCE)
    with torch.no_grad():
        clean = run_slice(model, source, source.hidden, to=TARGET)
    for name in ("p2q1", "p1q1", "normalised", "steered||clean", "clean||steered"):
        theta = torch.zeros(2, decoder(model).d_model, requires_grad=True)
        value = evaluate(
            OBJECTIVES[name], model, run_slice(model, source, steered_source(source, theta), to=TARGET), clean
        )
        value.sum().backward()
        assert theta.grad is not None and bool(theta.grad.isfinite().all()), name
        torch.testing.assert_close(value, torch.zeros(2), atol=1e-5, rtol=0)
