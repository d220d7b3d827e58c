"""Reads user messages from files as they come: text, JSONL, JSON, CSV, Parquet, or a folder of `datasets`.

Text is one message per line. Tables have one message per row; the column is named, or guessed and the guess reported.
"""

import csv
import gzip
import io
import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from packaging.version import Version

from vectors.loading.chats import user_text
from vectors.loading.folders import is_local
from vectors.loading.hub import without_waiting

Rows = list[Any]
"""Dictionaries by column, or plain strings"""

COLUMNS = ("prompt", "instruction", "question", "query", "user", "message", "text", "input", "content", "goal")
"""Names that a column of user messages has, the surest first"""
CHATS = ("messages", "conversations", "conversation")
"""Names of columns that hold whole chats; the first user message of each is taken"""
SURROGATE = re.compile("[\ud800-\udfff]")
"""Half a character beyond the first 65,536, which JSON can write and no tokenizer takes"""
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
"""Name of a data set on the hub: owner/name"""
ENDINGS = (".txt", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
UNREAD = (
    ".yaml",
    ".yml",
    ".xml",
    ".html",
    ".xlsx",
    ".xls",
    ".ods",
    ".docx",
    ".pdf",
    ".arrow",
    ".feather",
    ".pkl",
    ".zip",
)
"""Endings of files that are no list of messages, whatever their lines look like"""
MARKS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
"""Byte order marks"""


def read_texts(path: Path, fewest: int = 1, column: str | None = None) -> list[str]:
    """Different user messages of a file; empty ones are left out.

    Args:
        path: text with one message per line, .jsonl, .json, .csv, .tsv, .parquet, a folder that `datasets` saved or
            loads, or the name of a data set on the hub.
        fewest: messages that there must be.
        column: of a table; guessed by its name where none is given, and the guess is logged.

    Raises:
        ValueError: no such file, not readable as what it is, no such column, or too few messages.
    """
    path = Path(path)
    named = not is_local(str(path)) and HUB_ID.fullmatch(str(path)) and path.suffix not in ENDINGS
    there = os.path.exists(path) and (path.is_file() or _is_saved(path) or _tables_in(path))
    if not named and not there:
        raise ValueError(f"no prompt file {path}; give a text file with one user message per line")
    if path.suffix.lower() in UNREAD:
        raise ValueError(f"{path} is no list of messages that is read here; save it as text, JSONL, CSV or Parquet")
    found = _table(path)
    if found is None:
        if column is not None:
            raise ValueError(f"{path} is plain text and has no column {column!r}; leave the column out")
        found = _decoded(path).replace("\r\n", "\n").replace("\r", "\n").split("\n")  # only these end a line
    texts = list(dict.fromkeys(text.strip() for text in _messages(found, column, path) if text and text.strip()))
    broken = next((text for text in texts if not text.isascii() and SURROGATE.search(text)), None)
    if broken is not None:
        raise ValueError(f"{path} holds half a character (a lone surrogate) in {broken[:60]!a}; take it out")
    if len(texts) < fewest:
        raise ValueError(f"{path} holds {len(texts)} different prompts; give at least {fewest}")
    return texts


def _is_saved(path: Path) -> bool:
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _tables_in(folder: Path) -> list[Path]:
    """The tables of a data set's folder, of one kind; those of its training split where names say which they are."""
    for ending in ("parquet", "jsonl", "json", "csv", "tsv"):
        files = sorted([*folder.glob(f"*.{ending}"), *folder.glob(f"data/*.{ending}")])
        if files:
            return [file for file in files if "train" in file.name] or files
    return []


def _decoded(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    if content.startswith(b"\x1f\x8b"):
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError) as error:
            raise ValueError(f"{path} is cut off or broken ({error}); get it again") from error
    encoding = next((name for mark, name in MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}; save it as UTF-8") from error
    if "\0" in text:
        raise ValueError(f"{path} holds NUL bytes (binary, or UTF-16 without byte order mark); save it as UTF-8 text")
    return text


def _table(path: Path) -> Rows | None:
    """Rows of a file that is a table by its name, or JSON by what it holds; None for plain text."""
    readers: dict[str, Callable[[Path], Rows]] = {
        ".jsonl": _json_lines,
        ".ndjson": _json_lines,
        ".json": _json,
        ".csv": lambda file: _separated(file, ","),
        ".tsv": lambda file: _separated(file, "\t"),
        ".parquet": _parquet,
    }
    reader = _dataset if not path.is_file() else readers.get(Path(path.name.lower().removesuffix(".gz")).suffix)
    if reader is not None:
        try:
            return reader(path)
        except ValueError as error:
            if str(error).startswith(str(path)):
                raise
            raise ValueError(_unreadable(path, error)) from error
        except Exception as error:  # the libraries have exceptions of their own
            raise ValueError(_unreadable(path, error)) from error
    opening = _decoded(path).lstrip()[:1]
    for read in (_json_lines, _json) if opening in ("{", "[") else ():
        try:
            return read(path)
        except ValueError:
            continue  # plain text that begins with a bracket
    return None


def _unreadable(path: Path, error: Exception) -> str:
    if path.exists():
        return f"{path} could not be read: {_first_line(error)}; is it what its name says?"
    return f"no prompt file {path}, and no data set of that name: {_first_line(error)}; give a file that is there"


def _json_lines(path: Path) -> Rows:
    rows = []
    for number, line in enumerate(_decoded(path).split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path} line {number} is no JSON: {error}; give one object per line") from error
    return _of_one_kind(rows, path)


def _json(path: Path) -> Rows:
    try:
        content = json.loads(_decoded(path))
    except json.JSONDecodeError as error:
        try:
            return _json_lines(path)  # often called .json too
        except ValueError:
            raise ValueError(f"{path} is no JSON: {error}; give a list of objects or strings") from error
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        if len(lists) != 1:
            raise ValueError(f"{path} is one JSON object with {len(lists)} lists; give a list of objects or strings")
        content = lists[0]
    return _of_one_kind(content, path)


def _of_one_kind(rows: Any, path: Path) -> Rows:
    if isinstance(rows, list) and all(isinstance(row, list) for row in rows):
        rows = [{CHATS[0]: row} for row in rows]  # a chat in every line
    kinds = set(map(type, rows)) if isinstance(rows, list) else set()
    if rows != [] and kinds not in ({dict}, {str}):
        raise ValueError(f"{path} holds JSON that is neither objects nor strings; give one object or string per prompt")
    return rows


def _separated(path: Path, separator: str) -> Rows:
    text = _decoded(path)
    header = text.partition("\n")[0]
    if separator not in header:  # spreadsheets of some countries write semicolons
        separator = max(separator, ";", "\t", key=header.count)
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True))
    except csv.Error as error:
        if separator != "\t":
            raise ValueError(f"{path} is broken: {error}; save it as CSV again") from error
        rows = [line.split("\t") for line in text.splitlines()]  # quotes mean nothing in most of these
    rows = [row for row in rows if any(row)]
    names = [name.strip() for name in rows[0]] if rows else []
    if len(set(names)) < len(names):
        raise ValueError(f"{path} has two columns of one name among {_listed(names)}; give each its own")
    if long := next((row for row in rows if len(row) > len(names)), None):
        raise ValueError(
            f"{path} has {len(names)} columns but {len(long)} cells in {separator.join(long)[:60]!r}; put quotes round "
            "text that holds the separator"
        )
    return [dict(zip(names, row, strict=False)) for row in rows[1:]]


def _parquet(path: Path) -> Rows:
    import pandas

    return pandas.read_parquet(path).to_dict("records")


def _dataset(path: Path) -> Rows:
    import datasets

    if path.is_dir() and not _is_saved(path):
        return [row for file in _tables_in(path) for row in _table(file) or []]
    datasets.disable_progress_bars()
    if path.is_dir():
        loaded = datasets.load_from_disk(str(path))
    else:
        # From version 4 on no code of a data set is ever run, and the argument is gone.
        more: dict[str, Any] = {"trust_remote_code": False} if Version(datasets.__version__) < Version("4") else {}
        with without_waiting(str(path)):
            loaded = datasets.load_dataset(str(path), **more)
    if isinstance(loaded, datasets.DatasetDict):
        if len(loaded) != 1 and "train" not in loaded:
            raise ValueError(f"{path} holds the splits {', '.join(map(str, loaded))}; give the folder of one of them")
        loaded = loaded["train"] if "train" in loaded else next(iter(loaded.values()))
    return list(loaded)


def _messages(rows: Rows, column: str | None, path: Path) -> list[str]:
    if not rows or isinstance(rows[0], str):
        return rows
    names = list(dict.fromkeys(str(name) for row in rows for name in row))
    if column is None:
        column = _guessed(rows, names, path)
        logging.getLogger(__name__).warning("%s: prompts are taken from its column %r", path, column)
    if column not in names:
        raise ValueError(f"{path} has no column {column!r}; it has {_listed(names)}")
    texts = [user_text(row.get(column)) for row in rows]
    if None in texts:
        first = json.dumps(rows[texts.index(None)].get(column), default=str)[:60]
        others = _listed([name for name in names if name != column])
        raise ValueError(
            f"{path} column {column!r} holds something else than text or chats, first {first}; "
            + (f"give one of {others}" if others else "give one message as text per row")
        )
    return [text for text in texts if text is not None]


def _guessed(rows: Rows, names: list[str], path: Path) -> str:
    lower = {name.lower(): name for name in reversed(names)}
    known = [lower[name] for name in (*COLUMNS, *CHATS) if name in lower]
    usable = [name for name in known if all(user_text(row.get(name)) is not None for row in rows)]
    if usable:
        return usable[0]
    if len(names) == 1:
        return names[0]
    raise ValueError(f"{path} has the columns {_listed(names)}, and none is known to hold prompts; name the column")


def _listed(names: list[str]) -> str:
    """The columns in one line, whatever their names hold."""
    return ", ".join(name if name.isprintable() and name else repr(name) for name in names)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
