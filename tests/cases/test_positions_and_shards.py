"""Settings and weights that are there twice, or that one version of transformers reads and another passes over."""

import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file

from tests.cases import test_checkpoints
from tests.cases.test_checkpoints import edit, refused
from vectors.models import load_model
from vectors.prompt_files import read_texts

folder = test_checkpoints.folder
OLD = Version(transformers.__version__) < Version("5")


def positions(folder, **said):
    """Replaces what config.json says of positions."""
    config = json.loads((folder / "config.json").read_text())
    kept = {key: value for key, value in config.items() if not key.startswith("rope_")}
    (folder / "config.json").write_text(json.dumps(kept | said))


def test_positions_that_old_versions_do_not_read(folder):
    theta = {"rope_type": "default", "rope_theta": 100.0}
    positions(folder, rope_parameters=theta)
    if OLD:
        refused(folder, "sets rope_theta in rope_parameters", "update transformers")
    else:
        assert load_model(folder)[0].config.rope_parameters["rope_theta"] == 100.0
    positions(folder, rope_parameters={**theta, "rope_type": "linear", "factor": 4.0}, rope_theta=100.0)
    if OLD:
        refused(folder, "sets rope_type in rope_parameters", "update transformers")
    for said in ({"rope_parameters": theta, "rope_theta": 100.0}, {"rope_theta": 100.0}):
        positions(folder, **said)
        load_model(folder)
    positions(folder, rope_parameters={**theta, "rope_theta": 10000.0})  # what old versions take by themselves
    load_model(folder)


def test_positions_that_are_said_twice(folder):
    positions(folder, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, rope_theta=100.0)
    refused(folder, "sets rope_theta in rope_parameters" if OLD else f"{folder} gives rope_theta twice")


def test_a_weight_that_two_shards_hold(folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    first = {name: value for name, value in weights.items() if "layers.0" not in name}
    second = {name: value for name, value in weights.items() if "layers.0" in name}
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    places = dict.fromkeys(first, shards[0]) | dict.fromkeys(second, shards[1])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    save_file(first, folder / shards[0], metadata={"format": "pt"})
    for value, same in ((weights["model.norm.weight"], True), (torch.zeros(32), False)):
        save_file(second | {"model.norm.weight": value}, folder / shards[1], metadata={"format": "pt"})
        if same:
            load_model(folder)
        else:
            refused(folder, f"two different model.norm.weight, in {shards[0]} and in {shards[1]}")


def test_links_to_nothing_and_the_folders_of_the_cache(folder, tmp_path):
    (tmp_path / "cache" / "snapshots").mkdir(parents=True)
    snapshot = folder.rename(tmp_path / "cache" / "snapshots" / "5f0e")
    refused(tmp_path / "cache", f"give a folder inside that does, such as {snapshot}")
    (snapshot / "tokenizer.json").rename(tmp_path / "blob")
    os.symlink("../../blobs/1a2b", snapshot / "tokenizer.json")
    refused(snapshot, "tokenizer.json is a link to ../../blobs/1a2b, which is not there")
    (snapshot / "tokenizer.json").unlink()
    refused(snapshot, f"{snapshot} holds no tokenizer.json")


def test_a_prompt_file_that_cannot_be_read(tmp_path, monkeypatch):
    def denied(_self):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "clean.txt").write_text("hello")
    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(ValueError, match="clean.txt cannot be read: Permission denied"):
        read_texts(tmp_path / "clean.txt")


def test_settings_that_do_not_differ(folder):
    edit(folder, rope_scaling=None)
    load_model(folder)
