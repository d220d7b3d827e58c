"""A vector method from outside the package is one line in a dict, and then a choice of the command line."""

import pytest
import torch

from examples.principal_components import METHODS as EXAMPLES
from examples.principal_components import PrincipalComponents
from vectors.__main__ import main
from vectors.commands import learn
from vectors.residual import cache_source, mean_norm
from vectors.steering import SteeringVectors


def test_the_example_finds_the_directions_in_which_prompts_differ_most(llama, prompts, generator):
    found = PrincipalComponents(source_layer=1, target_layer=4, radius=0.5, count=2)(llama, prompts, generator)
    source = cache_source(llama, prompts, 1)
    last = source.hidden[:, -1] - source.hidden[:, -1].mean(0)
    assert found.theta.norm(dim=-1).tolist() == pytest.approx([0.5 * mean_norm(source)] * 2, rel=1e-4)
    unit = torch.nn.functional.normalize(found.theta, dim=-1)
    # Three centred rows span two directions, so nothing of them is left outside; the first one takes most.
    torch.testing.assert_close(last @ unit.T @ unit, last, atol=1e-4, rtol=1e-3)
    assert (last @ unit[0]).norm() > (last @ unit[1]).norm()
    with pytest.raises(ValueError, match="3 prompts differ in 2 directions; count is 3"):
        PrincipalComponents(source_layer=1, target_layer=4, radius=0.5, count=3)(llama, prompts, generator)


def test_a_line_in_the_dict_is_enough_for_the_command_line(llama, tokenizer, tmp_path, monkeypatch, capsys):
    llama.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    text = tmp_path / "clean.txt"
    text.write_text("\n".join(f"w{4 + i} w{20 + 2 * i}" for i in range(5)))
    words = ["learn", tmp_path / "model", "--device", "cpu", "--prompts", text, "--out", tmp_path / "v.safetensors"]
    words = [*map(str, words), "--method", "principal-components", "--count", "3", "--learn-prompts", "5"]
    assert main(words) == 2 and "choose from unsupervised, consensus" in capsys.readouterr().err
    monkeypatch.setattr(learn, "METHODS", learn.METHODS | EXAMPLES)
    assert main([*words, "--steps", "3"]) == 2 and "has no --steps; leave it out" in capsys.readouterr().err
    assert main(words) == 0
    found = SteeringVectors.load(tmp_path / "v.safetensors")
    assert (found.method, len(found), found.source_layer) == ("principal components", 3, 1)
