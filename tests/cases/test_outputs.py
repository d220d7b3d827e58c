"""Results take the place of files only."""

import os

import pytest

from attacks.__main__ import Arguments, check
from vectors.commands.files import check_free


def kinds(folder):
    os.mkfifo(folder / "pipe")  # as devices are no files: /dev/null, /dev/stdout
    (folder / "target").write_text("kept")
    (folder / "link").symlink_to(folder / "target")
    (folder / "dangling").symlink_to(folder / "gone")
    return {
        "pipe": "a link, or a device",
        "link": "a link, or a device",
        "dangling": "a link, or a device",
        ".": "a folder",
    }


def test_what_is_no_file_stays_what_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, what in kinds(tmp_path).items():
        with pytest.raises(ValueError, match=f"it is {what}; give a file name"):
            check(Arguments(model="m", prompts=tmp_path, out=tmp_path.joinpath(name)))
        with pytest.raises(ValueError, match=f"is {what}; give a file name"):
            check_free([tmp_path / name], overwrite=True)
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "link").is_symlink()
    check(Arguments(model="m", prompts=tmp_path, out=tmp_path / "target"))
    with pytest.raises(ValueError, match="it is a folder; give a file name"):
        check(Arguments(model="m", prompts=tmp_path, out=tmp_path.relative_to(tmp_path)))
