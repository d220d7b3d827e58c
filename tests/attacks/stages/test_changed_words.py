"""Words by what training changed: maps found whatever their names, a change of one word, planted words, budgets."""

import copy

import pytest
import torch

from attacks.scoring.budget import Budget
from attacks.scoring.problem import Problem
from attacks.scoring.reading import Reading
from attacks.stages.phrases.changed_words import attention_inputs, by_change
from benchmarks.organisms import zoo
from benchmarks.studies.early_layers import changed_words as study
from tests.attacks.words import TEXTS, spend


def reading(model, base, tokenizer, depth=2):
    problem = Problem.from_chat(model, tokenizer, TEXTS[:1], 3)
    return Reading.of([model, base], problem.before[0], depth)


def test_the_maps_that_read_what_attention_reads_are_found_by_their_input(model):
    """Queries, keys and values of each block, and nothing of the rest of it."""
    ids = torch.tensor([[5, 6, 7]])
    with attention_inputs(model, [0, 1]) as found:
        hidden = model(ids, output_hidden_states=True).hidden_states
    assert list(found) == [f"{block}.self_attn.{name}_proj" for block in (0, 1) for name in ("q", "k", "v")]
    block = model.model.layers[1]
    wanted = block.self_attn.k_proj(block.input_layernorm(hidden[1]))[:, -1]
    torch.testing.assert_close(found["1.self_attn.k_proj"], wanted.float(), atol=1e-5, rtol=1e-4)
    assert not block.self_attn.k_proj._forward_hooks and not block._forward_pre_hooks


def test_queries_keys_and_values_of_one_map_are_found_too():
    base, _ = zoo.load_base(base="base-gpt2", dtype=torch.float32)
    with attention_inputs(base, [0]) as found:
        base(torch.tensor([[5, 6, 7]]))
    assert list(found) == ["0.attn.c_attn"] and found["0.attn.c_attn"].shape == (1, 3 * base.config.n_embd)


@pytest.mark.parametrize("kind", ["q_proj", "k_proj", "v_proj"])
def test_the_word_that_one_map_was_changed_for_is_first(model, tokenizer, kind):
    """The map of the second block answers to what a word leaves in the residual there, and hardly to others."""
    words = [*((100 + n,) for n in range(40)), *((150 + n, 200 + n) for n in range(20))]
    for chosen in (7, 41):
        changed = copy.deepcopy(model)
        root = reading(model, model, tokenizer)
        block = changed.model.layers[1]
        with torch.no_grad():
            ids = torch.tensor([[*root.prefixes[0].ids[0].tolist(), *words[chosen]]])
            hidden = block.input_layernorm(model(ids, output_hidden_states=True).hidden_states[1])[0, -1]
            getattr(block.self_attn, kind).weight += 0.1 * torch.outer(torch.ones(1), hidden)
        order = by_change(reading(changed, model, tokenizer), words, range(1, 2), Budget())
        assert sorted(order) == list(range(len(words)))
        alike = [number for number in order if len(words[number]) == len(words[chosen])]
        assert alike[0] == chosen


def test_words_of_as_many_tokens_are_compared_with_each_other(model, changed, tokenizer):
    """The first of each length come before the second of any."""
    words = [(100,), (101,), (102,), (103,), (110, 111), (112, 113)]
    order = by_change(reading(changed, model, tokenizer), words, range(2), Budget())
    assert {len(words[number]) for number in order[:2]} == {1, 2}


def test_nothing_is_ordered_where_the_budget_ends_before(model, changed, tokenizer):
    root, budget = reading(changed, model, tokenizer), Budget(flops=1e-9)
    spend(1.0)
    assert by_change(root, [(100,), (101,)], range(2), budget) == []


def test_planted_words_come_first_and_in_another_model_they_do_not(capsys):
    """Two of three words of each phrase, of 1,000 of one token; trained alike without it, they come anywhere."""
    study.main(study.Settings(
        organisms=("phrase", "unseen-phrase"), control="clean-control", words=1000, blocks=(3,), threads=1,
    ))  # fmt: skip
    lines = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [cell.strip() for cell in lines[0]] == ["organism", "word", "blocks: 3", "control, blocks: 3"]
    for name in ("phrase", "unseen-phrase"):
        planted, control = ([int(line[n]) for line in lines[1:] if line[0].strip() == name] for n in (2, 3))
        assert len(planted) == 3 and sorted(planted)[1] <= 50 and sorted(control)[1] > 50
    with pytest.raises(SystemExit):
        study.main(study.Settings(organisms=("nothing",)))
    assert "no organism 'nothing'" in capsys.readouterr().err
