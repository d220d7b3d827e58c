"""The command line on a saved model, each command to the end; bad input is one clear line and exit code 2."""

import json
import signal

import pytest

from vectors.__main__ import main
from vectors.analysis.behaviours import Behaviour
from vectors.commands import rank as ranking
from vectors.methods import unsupervised
from vectors.steering import SteeringVectors


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "clean.txt"
    lines = [f"w{4 + 3 * i} w{5 + 2 * i} w{40 + i}" for i in range(12)]
    path.write_text("\n".join([*lines, lines[0], "", " "]) + "\n")
    return path


@pytest.fixture
def call(folder, prompts, capsys):
    """Runs a command on the model; (exit code, stdout, last line of stderr)."""

    def run(command, *words, text=prompts):
        given = ["--prompts", text] if command in ("learn", "rank", "calibrate") else []
        code = main([str(word) for word in (command, folder, "--device", "cpu", *words, *given)])
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if "Loading weights" not in line and "shards" not in line]
        assert len(list(filter(None, lines))) == (code != 0 and "interrupted:" not in out)
        return code, out, lines[-1] if lines else ""

    return run


def learned(call, path, *words):
    code, out, _ = call("learn", "--out", path, "--count", 6, "--steps", 3, *words)
    assert code == 0 and f"wrote {path}" in out
    return SteeringVectors.load(path)


def test_learns_saves_and_draws(call, tmp_path):
    path = tmp_path / "new" / "v.safetensors"
    found = learned(call, path)
    assert (len(found), found.source_layer, found.target_layer, found.radius) == (6, 1, 4, 0.3)
    assert found.method == "unsupervised/OutputKL" and len(found.scores["objective"]) == 6
    names = ("v-cosines.pdf", "v-cosines.png", "v-learning.pdf", "v-learning.png", "v.safetensors")
    assert tuple(sorted(file.name for file in path.parent.iterdir())) == names


METHODS = {
    "unsupervised/ChangeNorm/SoftOrthogonality/Contrastive": (
        "--objective norm --p 4 --q 2 --tokens 2 --orthogonal soft --contrastive 0.5"
    ),
    "unsupervised/NormalizedChange": "--objective normalized --orthogonal hard --batch-size 4",
    "consensus": "--method consensus --learn-prompts 3 --batch-size 2 --tokens 3",
    "adapters/OutputKL": "--method adapters --batch-size 4",
    "jacobian": "--method jacobian --tokens 1",
    "hessian/OutputKL": "--method hessian",
    "exponential-dct/soft": "--method dct --orthogonal soft",
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns(call, tmp_path, method):
    path = tmp_path / "v"  # any suffix will do
    found = learned(call, path, *METHODS[method].split(), "--source-layer", 2, "--target-layer", 3)
    assert found.method == method and len(found) == 6 and (found.source_layer, found.target_layer) == (2, 3)
    drawn = method.startswith(("unsupervised", "consensus", "adapters"))
    assert (tmp_path / "v-cosines.png").is_file() and (tmp_path / "v-learning.png").is_file() == drawn


def test_batches_change_nothing_and_seeds_do(call, tmp_path):
    one, two = (learned(call, tmp_path / f"{size}.safetensors", "--batch-size", size) for size in (2, 6))
    assert one.theta == pytest.approx(two.theta, abs=1e-4)
    other = learned(call, tmp_path / "other.safetensors", "--seed", 1)
    assert not one.theta.allclose(other.theta, atol=1e-2)


def test_several_radii_have_a_file_each_and_nothing_is_overwritten(call, tmp_path):
    path = tmp_path / "v.safetensors"
    words = ["--out", path, "--count", 3, "--steps", 1, "--radius", 0.2, 0.4]
    assert call("learn", *words)[0] == 0
    for radius in (0.2, 0.4):
        assert SteeringVectors.load(tmp_path / f"v-R{radius}.safetensors").radius == radius
        assert (tmp_path / f"v-R{radius}-cosines.png").is_file()
    before = (tmp_path / "v-R0.4.safetensors").read_bytes()
    code, _, error = call("learn", *words, "--seed", 1)
    assert code == 2 and "v-R0.2.safetensors exists; give another --out, or --overwrite" in error
    assert (tmp_path / "v-R0.4.safetensors").read_bytes() == before
    assert call("learn", *words, "--seed", 1, "--overwrite")[0] == 0
    assert (tmp_path / "v-R0.4.safetensors").read_bytes() != before


@pytest.mark.parametrize("size, kept", [(6, 6), (2, 4)])
def test_an_interrupted_run_keeps_the_vectors_that_it_began(call, tmp_path, monkeypatch, size, kept):
    calls, evaluate = [], unsupervised.evaluate

    def pressed(*args):
        calls.append(1)
        if len(calls) == 6:  # the first batch of 2 takes 4 steps and a last look
            signal.raise_signal(signal.SIGINT)
        return evaluate(*args)

    monkeypatch.setattr(unsupervised, "evaluate", pressed)
    path, steps = tmp_path / "v.safetensors", 4 if size == 2 else 50
    before = signal.getsignal(signal.SIGINT)
    code, out, _ = call("learn", "--out", path, "--count", 6, "--steps", steps, "--batch-size", size)
    assert code == 130 and f"interrupted: {kept} of 6 vectors" in out and signal.getsignal(signal.SIGINT) is before
    found = SteeringVectors.load(path)
    assert len(found) == len(found.scores["objective"]) == kept
    assert (tmp_path / "v-learning.png").is_file()


def test_interrupted_before_anything_is_learned_writes_nothing(call, tmp_path, monkeypatch):
    def pressed(*_):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # the second does not wait for a step

    monkeypatch.setattr(unsupervised, "evaluate", pressed)
    code, _, error = call("learn", "--out", tmp_path / "v.safetensors", "--count", 2)
    assert code == 130 and error.startswith("interrupted") and not list(tmp_path.glob("v*"))


def test_ranks_several_files(call, tmp_path):
    paths = [tmp_path / name for name in ("a.safetensors", "b.safetensors")]
    for seed, path in enumerate(paths):
        learned(call, path, "--seed", seed)
    out = tmp_path / "r" / "ranked.json"
    code, printed, _ = call("rank", *paths, "--skip", 2, "--out", out, "--top", 3, "--threshold", 0.5)
    ranked = json.loads(out.read_text())
    assert code == 0 and f"wrote {out}" in printed and "note:" not in printed and ranked["prompts"] == 10
    assert list(ranked["files"]) == [str(path) for path in paths]
    for part in ranked["files"].values():
        assert [score["index"] for score in part["scores"]] == list(range(6))
        assert sorted(index for group in part["clusters"] for index in group["members"]) == list(range(6))
    assert "groups" in printed and "generality" in printed
    assert "on all lines" in call("rank", *paths, "--out", tmp_path / "all.json")[1]


def test_a_behaviour_is_printed_as_it_is_and_its_vector_named(call, tmp_path, monkeypatch):
    paths = [tmp_path / name for name in ("a.safetensors", "b.safetensors")]
    for path in paths:
        learned(call, path)

    def found(_model, _tokenizer, pool, _prompts, _ranking):
        numbers = dict(agreement=0.5, reach=1.0, surprise=9.0, certainty=0.5, score=0.25)
        return [Behaviour(text="[/b]\x1b[2J", token_ids=(4, 5, 6), votes=4, vector=pool[1][4], **numbers)]

    monkeypatch.setattr(ranking, "rank_behaviours", found)
    code, printed, _ = call("rank", *paths, "--out", tmp_path / "ranked.json")
    (row,) = json.loads((tmp_path / "ranked.json").read_text())["behaviours"]
    assert code == 0 and (row["file"], row["index"], row["votes"]) == (str(paths[1]), 4, 4)
    assert "[/b]" in printed and "\x1b[2J" not in printed and "b.safetensors" in printed.replace("\n", "")
    assert (tmp_path / "ranked-behaviours.png").is_file()


def longest(texts):
    """A judge."""
    return [len(set(text.split())) for text in texts]


def test_calibrates_by_every_rule(call, tmp_path):
    for rule, words, radii in (
        ("nonlinearity", ["--target", 0.3], 1),
        ("several", [], 4),
        ("judged", ["--judge", f"{__name__}:longest", "--radii", 0.1, 1.0, "--count", 3, "--steps", 1], 1),
        ("cusp", ["--radii", 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, "--count", 4, "--steps", 1], 1),
    ):
        folder = tmp_path / rule
        code, printed, error = call("calibrate", "--rule", rule, "--out", folder, *words)
        assert code == 0, error
        choice = json.loads((folder / "radius.json").read_text())
        assert len(choice["radii"]) == radii and f"{choice['radii'][0]:.4g}" in printed
        assert (folder / "radius_curve.png").is_file() and choice["tried"] == sorted(choice["tried"])
    code, _, error = call("calibrate", "--rule", "nonlinearity", "--out", tmp_path / "cusp")
    assert code == 2 and "radius.json exists" in error


def test_a_vector_goes_out_and_comes_back(call, tmp_path):
    vectors, gguf, again = (tmp_path / name for name in ("v.safetensors", "v.gguf", "again.safetensors"))
    found = learned(call, vectors, "--source-layer", 2)
    code, printed, _ = call("export", vectors, "--index", 4, "--out", gguf)
    assert code == 0 and "llama.cpp: --control-vector" in printed and (tmp_path / "v-exported.png").is_file()
    assert call("import-gguf", gguf, "--out", again)[0] == 0
    back = SteeringVectors.load(again)
    assert back.theta.equal(found.theta[4:5]) and (back.source_layer, back.model_id) == (2, found.model_id)
    learned(call, vectors, "--overwrite")  # source layer 1
    _, printed, _ = call("export", vectors, "--index", 0, "--out", gguf, "--overwrite")
    assert "llama.cpp refuses direction.0" in printed
    assert "gguf exists" in call("export", vectors, "--index", 0, "--out", gguf)[2]
    assert "index is 6 but there are 6 vectors" in call("export", vectors, "--index", 6, "--out", tmp_path / "x")[2]


def test_bad_input_is_one_line_and_exit_2(call, tmp_path):
    few, out = tmp_path / "few.txt", tmp_path / "v.safetensors"
    few.write_text("w5\nw5\n\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\nw5\n")
    learn, rank, calibrate = (
        ("learn", "--out", out),
        ("rank", tmp_path / "none"),
        ("calibrate", "--out", tmp_path / "c"),
    )
    for words, message in (
        ((*learn, "--lr", 0.1, "--method", "jacobian"), "--method jacobian has no --lr; leave it out"),
        ((*learn, "--p", 2, "--q", 1), "--objective kl has no --p and no --q"),
        ((*learn, "--method", "hessian", "--objective", "normalized"), "hessian has no --objective normalized"),
        ((*learn, "--method", "adapters", "--orthogonal", "hard"), "adapters has no --orthogonal hard"),
        ((*learn, "--method", "dct", "--orthogonal", "none"), "dct has no --orthogonal none"),
        ((*learn, "--tokens", 0), "tokens is 0; it must be more than 0"),
        ((*learn, "--radius", 0.3, 0.3), "radii are (0.3, 0.3); give at least 1, all different"),
        ((*learn, "--target-layer", 5), "target layer is 5 but the model has 4 layers"),
        ((*learn, "--source-layer", 4), "source layer 4 is not before target layer 4"),
        ((*learn, "--learn-prompts", 13), "holds 12 different prompts; give at least 13"),
        ((*learn, "--learn-prompts", 1, "--contrastive", 1), "needs two or more"),
        ((*learn, "--orthogonal", "hard", "--count", 33), "33 orthogonal vectors do not fit into 32 dimensions"),
        ((*learn, "--device", "toaster"), "no device 'toaster'"),
        ((*learn, "--threads", 0), "threads is 0"),
        ((*learn, "--adapter", tmp_path), "no peft adapter could be loaded"),
        (("learn", "--out", tmp_path), "is a folder; give a file name"),
        (("learn", "--out", few / "v"), "is a file; give another folder"),
        (("rank", few), "holds no steering vectors"),
        ((*rank, "--skip", 11), "holds 12 different prompts; give at least 13"),
        ((*rank, "--threshold", 2), "threshold is 2.0; a cosine is between -1 and 1"),
        (("rank",), "no file of vectors; give one or several"),
        ((*calibrate, "--rule", "cusp", "--radii", 1, 2), "give at least 5"),
        ((*calibrate, "--rule", "cusp", "--target", 1), "--rule cusp has no --target"),
        ((*calibrate, "--rule", "several", "--radii", 1), "--rule several has no --radii"),
        ((*calibrate, "--rule", "judged"), "got --judge None; give module:function"),
        ((*calibrate, "--rule", "judged", "--judge", "nowhere:x"), "no judge nowhere:x: No module named"),
        ((*calibrate, "--rule", "judged", "--judge", "json:x"), "no judge json:x: module 'json' has no attribute"),
        ((*calibrate, "--rule", "judged", "--judge", "json:__name__"), "give a function of a list of texts"),
        (("import-gguf", few, "--out", out), "is no gguf control vector"),
    ):
        code, _, error = call(*words)
        assert code == 2 and error.startswith("error: ") and message in error, (words, error)
    for text, message in ((few, "holds 1 different prompts; give at least 2"), (tmp_path, "no prompt file")):
        assert message in call(*learn, text=text)[2]
    assert "is no text in UTF-8" in call(*learn, text=tmp_path / "latin.txt")[2]
    assert not out.exists()
