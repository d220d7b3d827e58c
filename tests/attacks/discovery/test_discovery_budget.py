"""Discovery with nothing known ends within its share of a budget, however slow the model or large its vocabulary."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from attacks.discovery.plan import Plan
from attacks.discovery.unsupervised import DISCOVERY, Unsupervised
from attacks.scoring import budget as budgets
from attacks.scoring.budget import Budget
from attacks.scoring.planning import forward_flops, head_flops
from attacks.suspect import Suspect
from tests.architectures import word_tokenizer
from vectors.memorised import audition
from vectors.operations import executed

LAYERS, TOKENS = 4, 6
OVERRUN = 0.05
"""Share of the budget, in (0, 1], by which discovery may miss its end"""


class Clock:
    """Stands in for the module `time`: seconds pass only where a model computes."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


def tiny_suspect(vocabulary):
    """Four blocks of width four, and a word-level tokenizer: nearly all operations are those of the unembedding."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=4, intermediate_size=8, num_hidden_layers=LAYERS, num_attention_heads=2,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    return Suspect(model=model, tokenizer=word_tokenizer(vocabulary))


def discover(monkeypatch, suspect, budget, **settings):
    """(sources that were cut short, share of the budget at which the last round of discovery has to end)."""
    begun = []

    def candidates(self, *arguments, real=Unsupervised.candidates):
        begun.append(budget.share)
        return real(self, *arguments)

    monkeypatch.setattr(Unsupervised, "candidates", candidates)
    texts = [" ".join(f"w{4 + 2 * row + place}" for place in range(3 + row % 3)) for row in range(24)]
    quick = Unsupervised(count=16, recited_on=4, held_out=4, completion=TOKENS, opening=4, **settings)
    cut = quick(suspect, texts, budget, torch.Generator().manual_seed(0), 0.3)[1]
    assert len(begun) == 1 + bool(quick.fallback)
    return cut, begun[-1] + DISCOVERY * (1 - begun[-1])


def test_a_large_vocabulary_is_recited_in_part(monkeypatch):
    suspect, budget, counts = tiny_suspect(30_000), Budget(flops=4e9), []
    model = suspect.model

    def recited(*arguments, count, real=audition.recited_answers, **others):
        counts.append(count)
        return real(*arguments, count=count, **others)

    monkeypatch.setattr(audition, "recited_answers", recited)
    whole = 30_000 * 2 * 3 * (forward_flops(model, 1) + head_flops(model, 1))  # two prompts, three tokens behind each
    assert whole > 8 * 4e9
    cut, end = discover(monkeypatch, suspect, budget, recited=8, fallback=0)
    assert "ConsensusVectors" in cut and len(counts) == 1 and 8 <= counts[0] < 1000
    assert 0.3 < budget.share < end + OVERRUN


@pytest.mark.parametrize(("recited", "fallback"), [(0, 0), (8, 0), (0, 8)])
@pytest.mark.parametrize("flops", [3e6, 3e7, 6e7])
def test_operations_end_at_the_share_of_discovery(monkeypatch, flops, recited, fallback):
    budget = Budget(flops=flops)
    _, end = discover(monkeypatch, tiny_suspect(64), budget, recited=recited, fallback=fallback)
    assert 0.1 < budget.share < end + OVERRUN


@pytest.mark.parametrize("fallback", [0, 8])
@pytest.mark.parametrize("seconds", [30.0, 240.0])
@pytest.mark.parametrize("by", ["call", "operation"])
def test_a_slow_model_ends_at_the_share_of_discovery(monkeypatch, by, seconds, fallback):
    """A block takes an eighth of a second a call whatever its batch, or a second for so many operations."""
    clock, suspect, done = Clock(), tiny_suspect(64), executed()
    monkeypatch.setattr(budgets, "time", clock)

    def pass_time(*_):
        nonlocal done
        clock.now += 0.125 if by == "call" else (executed() - done) / 2e5
        done = executed()

    for layer in suspect.model.model.layers:
        layer.register_forward_hook(pass_time)
    budget = Budget(seconds=seconds)
    budget.began = clock.now  # the default is read off the real clock
    _, end = discover(monkeypatch, suspect, budget, fallback=fallback)
    # Where a call costs the same for one row as for many, a smaller batch ends no sooner: one batch of completions, and
    # one forward pass for the likelihood of an opening, may come after the last look at the clock.
    batch = 0.125 * LAYERS * (TOKENS + 1) / seconds if by == "call" else 0.0
    assert 0.1 < budget.share < end + max(OVERRUN, batch)


def test_discovery_is_complete_without_what_few_budgets_have_room_for(monkeypatch):
    suspect, whole = tiny_suspect(64), Budget(flops=1e12)
    fitted, used = [], []

    def fit(self, method, *arguments, real=Plan.consensus, **changed):
        fitted.append(replace(real(self, method, *arguments), **used[-1]))
        return fitted[-1]

    monkeypatch.setattr(Plan, "consensus", fit)
    for changed, lacking in (({}, ()), ({"extended": 0}, ()), ({"count": 4}, ("ConsensusVectors",))):
        used.append(changed)
        assert discover(monkeypatch, suspect, whole.started(), recited=8, fallback=0)[0] == lacking
