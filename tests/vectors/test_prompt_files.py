"""Prompt files as they come: each is read as the plain one is, or refused in one line that names it."""

import gzip
import json
from pathlib import Path

import datasets
import pandas
import pytest

from vectors.prompt_files import read_texts

TEXTS = ["Describe the river, please", 'He said "go"', "What is a kite?"]
LINES = "\n".join(TEXTS) + "\n"


@pytest.mark.parametrize(
    "content",
    [
        LINES.encode(),
        LINES.replace("\n", "\r\n").encode(),
        LINES.encode("utf-8-sig"),
        LINES.encode("utf-16"),
        ("\n\n" + LINES + TEXTS[0]).encode(),
    ],
    ids=["plain", "crlf", "utf-8 mark", "utf-16 mark", "blank and doubled lines"],
)
def test_text_files(tmp_path, content):
    (tmp_path / "prompts.txt").write_bytes(content)
    assert read_texts(tmp_path / "prompts.txt", 3) == TEXTS


@pytest.mark.parametrize("inside", ["\u2028", "\x85", "\x0b", "\x1c"])
def test_only_line_feeds_end_a_line(tmp_path, inside):
    (tmp_path / "prompts.txt").write_text(f"one{inside}half\ntwo\n", encoding="utf-8", newline="")
    assert read_texts(tmp_path / "prompts.txt") == [f"one{inside}half", "two"]


def tables(folder):
    """The same prompts in every kind of table; the first column must not be taken."""
    rows = [{"id": str(number), "prompt": text} for number, text in enumerate(TEXTS)]
    chats = [{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": text}]} for text in TEXTS]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    for name, text in {
        "a.jsonl": lines,
        "jsonl.txt": lines,
        "a.json": json.dumps(rows, indent=2),
        "strings.json": json.dumps(TEXTS),
        "nested.json": json.dumps({"version": 1, "data": rows}),
        "chats.jsonl": "".join(json.dumps(chat) + "\n" for chat in chats),
        "semicolons.csv": "id;prompt\n"
        + "".join(f'{n};"{t.replace(chr(34), chr(34) * 2)}"\n' for n, t in enumerate(TEXTS)),
        "tabs.csv": "id\tprompt\n" + "".join(f"{n}\t{t}\n" for n, t in enumerate(TEXTS)),
        "spaced.csv": 'id, prompt\n1, "Describe the river, please"\n2, "He said ""go"""\n3, What is a kite?\n',
        "rows.jsonl": "".join(json.dumps(chat["messages"]) + "\n" for chat in chats),
        "parts.jsonl": "".join(
            json.dumps({"messages": [{"role": "User", "content": [{"type": "text", "text": text}]}]}) + "\n"
            for text in TEXTS
        ),
        "nobody asks.jsonl": lines + json.dumps({"prompt": [{"role": "system", "content": "s"}]}) + "\n",
    }.items():
        (folder / name).write_text(text)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pandas.DataFrame(rows).to_csv(folder / "a.csv", index=False)
    pandas.DataFrame(rows).to_csv(folder / "a.tsv", index=False, sep="\t")
    pandas.DataFrame(rows).to_parquet(folder / "a.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(str(folder / "dataset"))


def test_tables(tmp_path, caplog):
    tables(tmp_path)
    paths = sorted(tmp_path.iterdir())
    assert len(paths) == 17
    for path in paths:
        caplog.clear()
        assert read_texts(path) == TEXTS, path
        assert ("prompts are taken from its column" in caplog.text) == (path.name != "strings.json")
    assert read_texts(tmp_path / "a.csv", column="id") == ["0", "1", "2"]


REFUSED = {
    "nul.txt": (b"one\0\ntwo\n", "NUL bytes"),
    "wide.txt": (LINES.encode("utf-16-le"), "NUL bytes"),
    "latin.txt": ("naïve\n".encode("latin-1"), "is no text in UTF-8"),
    "broken.jsonl": (b'{"prompt": "a"}\n{"prompt": \n', "line 2 is no JSON"),
    "mixed.jsonl": (b'{"prompt": "a"}\n"b"\n', "neither objects nor strings"),
    "broken.json": (b"[1, ", "is no JSON"),
    "unknown.csv": (b"left,right\na,b\n", "has the columns left, right"),
    "broken.parquet": (b"PAR1", "could not be read"),
    "few.txt": (b"\n \n", "holds 0 different prompts; give at least 1"),
    "letters.json": (b'"a text of many letters"', "neither objects nor strings"),
    "null.json": (b"null", "neither objects nor strings"),
    "half.jsonl": (b'{"prompt": "a \\ud800"}\n', "half a character"),
    "cells.csv": (b"id,prompt\n1,one, two\n", "2 columns but 3 cells"),
    "doubled.csv": (b"prompt,prompt\na,b\n", "two columns of one name"),
    "quote.csv": (b'prompt\n"one\ntwo\n', "quote.csv is broken"),
    "number.jsonl": (b'{"prompt": "a"}\n{"prompt": 3}\n', "something else than text or chats, first 3; give one"),
    "list.yaml": (b"- prompt: one\n", "no list of messages that is read here"),
    "cut.txt.gz": (gzip.compress(b"one\n")[:-9], "cut off or broken"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(tmp_path, name):
    content, message = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_texts(tmp_path / name)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_quotes_mean_nothing_in_a_table_of_tabs_that_opens_more_than_it_closes(tmp_path):
    (tmp_path / "a.tsv").write_text('id\tprompt\n1\t"one\n2\ttwo\n3\t"three\n')
    assert read_texts(tmp_path / "a.tsv") == ['"one', "two", '"three']


def test_a_name_that_is_too_long_is_no_file():
    with pytest.raises(ValueError, match="no prompt file"):
        read_texts(Path("x" * 5000 + ".txt"))


def test_columns_that_are_not_there(tmp_path):
    tables(tmp_path)
    with pytest.raises(ValueError, match="has no column 'x'; it has id, prompt"):
        read_texts(tmp_path / "a.jsonl", column="x")
    (tmp_path / "plain.txt").write_text("one\n")
    with pytest.raises(ValueError, match="plain text and has no column"):
        read_texts(tmp_path / "plain.txt", column="x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no prompt file"):
        read_texts(tmp_path / "empty")


def test_a_folder_of_tables_is_read_by_its_training_split(tmp_path):
    (tmp_path / "data").mkdir()
    for split, texts in (("train", TEXTS), ("test", ["other"])):
        pandas.DataFrame({"prompt": texts}).to_parquet(tmp_path / "data" / f"{split}-00000.parquet")
    (tmp_path / "README.md").write_text("a data set")
    assert read_texts(tmp_path) == TEXTS


def test_a_data_set_that_cannot_be_fetched_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="no prompt file owner/name, and no data set of that name") as error:
        read_texts(Path("owner/name"))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="no prompt file owner/name.txt; give"):
        read_texts(Path("owner/name.txt"))
