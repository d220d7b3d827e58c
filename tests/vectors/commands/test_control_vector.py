"""Export and import of gguf control vectors, against an independent reader and a file as repeng writes it."""

import struct
from dataclasses import replace
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from vectors.commands.control_vector import export_gguf, import_gguf
from vectors.residual import decoder, read, steer
from vectors.steering import SteeringVectors

GIVEN: dict[str, Any] = {"target_layer": 9, "radius": 0.5, "method": "repeng", "model_id": "m"}


@pytest.fixture
def vectors(generator):
    return SteeringVectors(
        theta=torch.randn(3, 32, generator=generator),
        source_layer=2,
        target_layer=4,
        radius=0.1 + 0.2,  # needs double precision
        method="unsupervised/OutputKL",
        model_id="vertrauen/größe",
        scores={"objective": [1.0, 2.0, 3.0]},
    )


def write(path, directions, arch="controlvector", **strings):
    """A file as repeng writes it: architecture, model hint, number of directions, one tensor per layer."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_uint32("controlvector.layer_count", len(directions))
    for name, value in strings.items():
        writer.add_string(f"trigger_recovery.{name}", value)
    for name, values in directions.items():
        writer.add_tensor(f"direction.{name}" if isinstance(name, int) else name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_round_trip_gives_the_same_vector(vectors, tmp_path):
    path = tmp_path / "new" / "v.gguf"
    export_gguf(vectors, 1, path, model_type="llama", layers=4)
    loaded = import_gguf(path)
    assert torch.equal(loaded.theta, vectors.theta[1:2]) and loaded.scores == {}
    for name in ("source_layer", "target_layer", "radius", "method", "model_id"):
        assert getattr(loaded, name) == getattr(vectors, name)
    assert [file.name for file in path.parent.iterdir()] == ["v.gguf"]


def test_file_is_what_repeng_and_llama_cpp_read(vectors, tmp_path):
    export_gguf(vectors, 2, tmp_path / "v.gguf", model_type="qwen2", layers=4)
    reader = gguf.GGUFReader(tmp_path / "v.gguf")
    fields = {name: field.parts[-1] for name, field in reader.fields.items()}
    assert bytes(fields["general.architecture"]) == b"controlvector"
    assert bytes(fields["controlvector.model_hint"]) == b"qwen2"
    assert fields["controlvector.layer_count"].tolist() == [1]
    (tensor,) = reader.tensors  # llama.cpp refuses a file with any other tensor
    assert tensor.name == "direction.1" and tensor.tensor_type == gguf.GGMLQuantizationType.F32
    assert tensor.shape.tolist() == [32] and tensor.data.tolist() == vectors.theta[2].tolist()


def test_direction_n_is_added_to_the_output_of_block_n(model, prompts, vectors, tmp_path):
    export_gguf(vectors, 0, tmp_path / "v.gguf", model_type=model.config.model_type, layers=4)
    (tensor,) = gguf.GGUFReader(tmp_path / "v.gguf").tensors
    added = torch.tensor(tensor.data.copy())

    def as_repeng(_module, _args, output):
        return output + added if isinstance(output, torch.Tensor) else (output[0] + added, *output[1:])

    inputs = {"input_ids": prompts.input_ids, "attention_mask": prompts.attention_mask}
    handle = decoder(model).layers[int(tensor.name.split(".")[1])].register_forward_hook(as_repeng)
    theirs = read(model, layers=[4], **inputs)[4]
    handle.remove()
    loaded = import_gguf(tmp_path / "v.gguf")
    with steer(model, loaded.source_layer, loaded.theta[0]):
        ours = read(model, layers=[4], **inputs)[4]
    assert torch.equal(ours, theirs) and not torch.allclose(ours, read(model, layers=[4], **inputs)[4])


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_file_of_repeng_is_read(tmp_path, dtype):
    directions = {layer: np.full(8, layer + 0.5, dtype=dtype) for layer in (3, 1, 7)}
    path = write(tmp_path / "repeng.gguf", directions)
    loaded = import_gguf(path, layer=7, **GIVEN)
    assert loaded.theta.tolist() == [[7.5] * 8] and loaded.theta.dtype == torch.float32
    assert (loaded.source_layer, loaded.target_layer, loaded.radius, loaded.method, loaded.model_id) == (
        8, 9, 0.5, "repeng", "m")  # fmt: skip
    with pytest.raises(ValueError, match=r"directions at layers \[1, 3, 7\]; choose one with layer"):
        import_gguf(path, **GIVEN)
    with pytest.raises(ValueError, match=r"layer is 2 but .* has directions at layers \[1, 3, 7\]"):
        import_gguf(path, layer=2, **GIVEN)
    with pytest.raises(ValueError, match="target layer 8 is not behind source layer 8"):
        import_gguf(path, layer=7, **{**GIVEN, "target_layer": 8})
    only = write(tmp_path / "one.gguf", {0: directions[3]})
    assert import_gguf(only, **GIVEN).source_layer == 1
    with pytest.raises(ValueError, match="does not say radius, model_id; give them"):
        import_gguf(only, target_layer=9, method="x")
    loaded.theta.mul_(2)  # no view of the file
    assert import_gguf(path, layer=7, **GIVEN).theta.tolist() == [[7.5] * 8]


def test_what_is_given_goes_before_what_is_noted(vectors, tmp_path):
    export_gguf(vectors, 0, tmp_path / "v.gguf", model_type="llama", layers=4)
    assert import_gguf(tmp_path / "v.gguf", target_layer=3).target_layer == 3
    assert import_gguf(tmp_path / "v.gguf", model_id="other").model_id == "other"


@pytest.mark.parametrize(
    ("directions", "changed", "message"),
    [
        ({1: np.ones(8, np.float32)}, {"arch": "llama"}, "its architecture is 'llama'"),
        ({}, {}, "it has no directions"),
        ({1: np.ones((2, 8), np.float32)}, {}, r"direction.1 is F32 of shape \(8, 2\)"),
        ({1: np.ones(8, np.int32)}, {}, "direction.1 is I32"),
        ({1: np.full(8, np.nan, np.float32)}, {}, "not finite"),
        ({"direction.x": np.ones(8, np.float32)}, {}, "has a tensor 'direction.x'"),
        ({"direction.-1": np.ones(8, np.float32)}, {}, "has a tensor 'direction.-1'"),
        ({"output.weight": np.ones(8, np.float32)}, {}, "has a tensor 'output.weight'"),
        ({1: np.ones(8, np.float32)}, {"radius": "wide"}, "radius is 'wide', not of type float"),
    ],
)
def test_other_ggufs_are_refused(tmp_path, directions, changed, message):
    path = write(tmp_path / "v.gguf", directions, **changed)
    with pytest.raises(ValueError, match=f"is no gguf control vector: .*{message}"):
        import_gguf(path, **GIVEN)


def test_broken_files_are_refused(vectors, tmp_path):
    export_gguf(vectors, 0, tmp_path / "v.gguf", model_type="llama", layers=4)
    whole, path = (tmp_path / "v.gguf").read_bytes(), tmp_path / "broken.gguf"
    start = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sI", 1, b"x", 9)  # one field, an array
    endless = start + struct.pack("<IQ", 0, 2**60)
    nested = start + struct.pack("<IQ", 9, 1) * 9999
    offset = whole.index(b"direction.1") + 11 + 4 + 8 + 4  # behind the tensor's name, dimensions and type
    wrapped = whole[:offset] + b"\xff" * 8 + whole[offset + 8 :]
    cut = [whole[:length] for length in range(0, len(whole), 7)]
    for data in (b"", b"no", b"GGUF", endless, nested, wrapped, np.random.default_rng(0).bytes(999), *cut):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="is no gguf control vector: "):
            import_gguf(path)
    for missing in (tmp_path, tmp_path / "absent.gguf"):
        with pytest.raises(ValueError, match="is no gguf control vector: "):
            import_gguf(missing)
    refused = 0
    for position in range(offset + 8):  # the only other outcome is a vector, where a letter of a note has changed
        flipped = bytearray(whole)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        try:
            assert import_gguf(path).theta.shape == (1, 32)
        except ValueError:
            refused += 1
    assert refused > offset // 2


def test_what_cannot_be_exported_is_named(vectors, tmp_path):
    def export(changed, index=0, layers=4, model_type="llama"):
        export_gguf(changed, index, tmp_path / "v.gguf", model_type=model_type, layers=layers)

    with pytest.raises(ValueError, match="source layer is 0; .* can hold 1 to 3"):
        export(replace(vectors, source_layer=0))
    with pytest.raises(ValueError, match="source layer is 2; .* a model of 2 layers"):
        export(vectors, layers=2)
    with pytest.raises(ValueError, match="index is 3 but there are 3 vectors"):
        export(vectors, index=3)
    with pytest.raises(ValueError, match="model_type is empty"):
        export(vectors, model_type="")

    with pytest.raises(ValueError, match="cannot hold adapters"):
        export(replace(vectors, adapter_rank=2))
    assert list(tmp_path.iterdir()) == []
