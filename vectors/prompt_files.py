"""Reads user messages from files as they come: text, JSONL, JSON, CSV, Parquet, or a folder of `datasets`.

Text is one message per line. Tables have one message per row; the column is named, or guessed and the guess reported.
"""

import io
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from packaging.version import Version

Rows = list[Any]
"""Dictionaries by column, or plain strings"""

COLUMNS = ("prompt", "instruction", "question", "query", "user", "message", "text", "input", "content", "goal")
"""Names that a column of user messages has, the surest first"""
CHATS = ("messages", "conversations", "conversation")
"""Names of columns that hold whole chats; the first user message of each is taken"""
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
"""Name of a data set on the hub: owner/name"""
ENDINGS = (".txt", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
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
    named = not path.exists() and HUB_ID.fullmatch(str(path)) and path.suffix not in ENDINGS
    if not path.is_file() and not named and not (_is_saved(path) or _tables_in(path)):
        raise ValueError(f"no prompt file {path}; give a text file with one user message per line")
    found = _table(path)
    if found is None:
        if column is not None:
            raise ValueError(f"{path} is plain text and has no column {column!r}; leave the column out")
        found = _decoded(path).replace("\r\n", "\n").replace("\r", "\n").split("\n")  # only these end a line
    texts = list(dict.fromkeys(text.strip() for text in _messages(found, column, path) if text and text.strip()))
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
    content = path.read_bytes()
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
    reader = _dataset if not path.is_file() else readers.get(path.suffix.lower())
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


def _of_one_kind(rows: Rows, path: Path) -> Rows:
    if not (all(isinstance(row, dict) for row in rows) or all(isinstance(row, str) for row in rows)):
        raise ValueError(f"{path} holds JSON that is neither objects nor strings; give one object or string per prompt")
    return rows


def _separated(path: Path, separator: str) -> Rows:
    import pandas

    table = pandas.read_csv(io.StringIO(_decoded(path)), sep=separator, dtype=str, keep_default_na=False)
    return table.to_dict("records")


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
    texts = [_user_text(row.get(column)) for row in rows]
    if any(text is None for text in texts):
        raise ValueError(f"{path} column {column!r} holds something else than text; give one of {_listed(names)}")
    return [text for text in texts if text is not None]


def _guessed(rows: Rows, names: list[str], path: Path) -> str:
    lower = {name.lower(): name for name in reversed(names)}
    known = [lower[name] for name in (*COLUMNS, *CHATS) if name in lower]
    usable = [name for name in known if all(_user_text(row.get(name)) is not None for row in rows)]
    if usable:
        return usable[0]
    if len(names) == 1:
        return names[0]
    raise ValueError(f"{path} has the columns {_listed(names)}, and none is known to hold prompts; name the column")


def _listed(names: list[str]) -> str:
    """The columns in one line, whatever their names hold."""
    return ", ".join(name if name.isprintable() and name else repr(name) for name in names)


def _user_text(value: Any) -> str | None:
    """A text as it is, the first user message of a chat, nothing of an empty cell; None for anything else."""
    if value is None or (isinstance(value, float) and value != value):  # NaN: an empty cell of a table
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, dict) or not hasattr(value, "__iter__"):
        return None
    for message in value:  # {"role": "user", "content": ...} or {"from": "human", "value": ...}
        if isinstance(message, dict) and message.get("role", message.get("from")) in ("user", "human"):
            content = message.get("content", message.get("value"))
            return content if isinstance(content, str) else None
    return None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
