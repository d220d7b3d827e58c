"""A model whose blocks keep a convolution state: attacks read its text anew, and agree with plain forward passes."""

import pytest
import torch
import transformers

from attacks.objectives.target_nll import TargetNLL
from attacks.scoring.engine import Engine
from attacks.scoring.problem import Problem
from attacks.scoring.shared_prefix import SharedPrefix, keeps_keys_and_values
from tests.cases.made_tokenizers import byte_level
from tests.cases.test_tokenizers import TEXTS
from vectors.residual import read


@pytest.fixture(scope="module")
def case():
    if not hasattr(transformers, "Lfm2ForCausalLM"):
        pytest.skip("this transformers has no Lfm2")
    tokenizer = byte_level()
    torch.manual_seed(0)
    config = transformers.Lfm2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=128, layer_types=["conv", "full_attention", "conv"],
    )  # fmt: skip
    model = transformers.Lfm2ForCausalLM(config).eval().requires_grad_(False)
    return model, tokenizer


def test_losses_and_gradients_are_those_of_plain_forward_passes(case):
    model, tokenizer = case
    assert not keeps_keys_and_values(model)
    problem = Problem.from_chat(model, tokenizer, TEXTS, 2)
    engine, target = Engine(model, problem), [300, 301]
    tokens = (problem.allowed & problem.first).nonzero()[:6, 0]
    candidates = torch.stack([tokens, tokens.flip(0)], 1)
    plain = []
    for ids in candidates.tolist():
        rows = [torch.tensor([row + target]) for row in problem.filled(ids)]
        logits = [model(input_ids=row, use_cache=False).logits[0, -3:-1] for row in rows]
        plain.append(torch.stack([torch.nn.functional.cross_entropy(some, torch.tensor(target)) for some in logits]))
    objective = TargetNLL(target_ids=target)
    expected = torch.stack([losses.mean() for losses in plain])
    torch.testing.assert_close(engine.losses(objective, candidates), expected, rtol=1e-4, atol=1e-4)
    losses, gradient = engine.gradient(objective, candidates)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)
    assert gradient.shape == (6, 2, len(tokenizer)) and bool(gradient.any())


def test_a_prefix_without_keys_keeps_its_text(case):
    model, _ = case
    row = torch.tensor([[5, 6, 7]])
    prefix = SharedPrefix.run(model, row, torch.ones_like(row), 2).extended(model, torch.tensor([8, 9]))
    assert prefix.layers is None and prefix.cache(1, 2) is None and prefix.one_more is None
    assert prefix.ids.tolist() == [[5, 6, 7, 8], [5, 6, 7, 9]]
    assert prefix.taken(torch.tensor([1])).ids.tolist() == [[5, 6, 7, 9]]
    assert read(model, layers=[2], input_ids=prefix.ids)[2].shape == (2, 4, 32)
