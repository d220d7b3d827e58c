"""`findings.json`, the document that an audit leaves: its version, how it is written whole, read back and checked.

Nothing here imports torch, so that reports of finished audits are made again within a second.
"""

import json
import math
import os
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

SCHEMA = 1
"""Version of the document; raised whenever a field changes its meaning or goes. New fields may come without that."""
Document = dict[str, Any]
FOUND, NONE, INCONCLUSIVE = "finding", "none", "inconclusive"
"""Values of `status`; none found does not mean that the model is clean"""
Format = Literal["json", "html", "sarif"]
NAMES: dict[Format, str] = {"json": "findings.json", "html": "report.html", "sarif": "findings.sarif"}
"""File of each format, in the folder of an audit"""
VECTORS = "vectors.safetensors"
"""File of the steering vector that the finding's search imitated, in the same folder"""
LONGEST = 160
"""Characters of what a broken document holds that an error message quotes"""


def schema() -> Document:
    """The JSON schema (draft 2020-12) of the document."""
    return json.loads((files("attacks.audit") / "data" / "findings.schema.json").read_text(encoding="utf-8"))


def write(path: Path, text: str) -> None:
    """Puts a whole file in its place in one move, so that no reader ever finds half of it."""
    part = path.with_name(path.name + ".part")
    # Half a character (a lone surrogate, which command lines can hold) is written as its escape, legal in JSON too.
    part.write_bytes(text.encode("utf-8", "backslashreplace"))
    os.replace(part, path)


def finite(part: Any) -> Any:
    """Plain data with null in place of NaN and infinities, which are no JSON: a reader would refuse the whole file."""
    if isinstance(part, dict):
        return {name: finite(value) for name, value in part.items()}
    if isinstance(part, list | tuple):
        return [finite(value) for value in part]
    return None if isinstance(part, float) and not math.isfinite(part) else part


def read(path: Path) -> Document:
    """The document of an audit.

    Args:
        path: a `findings.json`, under whatever name, or the folder that holds one.

    Raises:
        ValueError: one line for a path that holds no such document, a torn one, or one of another schema.
    """
    file = path / NAMES["json"] if path.is_dir() else path
    if not file.is_file():
        what = f"{path} holds no {NAMES['json']}" if path.is_dir() else f"no file or folder {path}"
        raise ValueError(f"{what}; give a folder that `trigger-recovery audit` wrote")
    try:
        document = json.loads(file.read_text(encoding="utf-8"), parse_constant=_no_number)
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, NaN, or brackets within brackets without end
        raise ValueError(f"{file} is no whole JSON document ({error}); run the audit again") from error
    if not isinstance(document, dict) or "schema" not in document:
        raise ValueError(f"{file} was not written by `trigger-recovery audit`: it names no schema")
    if document["schema"] != SCHEMA:
        version = str(document["schema"])[:LONGEST]
        raise ValueError(f"{file} is of schema {version!r}, this version reads {SCHEMA}; update trigger-recovery")
    if fault := _fault(document):
        raise ValueError(f"{file} is not as the audit wrote it: {fault}")
    return document


def name_of(document: Document, path: Path) -> str:
    """What was audited; documents from before the name stood in them are called after their folder."""
    folder = path.absolute() if path.is_dir() else path.absolute().parent
    return document["model"].get("name") or folder.name.removeprefix("audit-")


def _fault(document: Document) -> str:
    """The most telling way in which a document breaks the schema, as one line; empty where it keeps to it."""
    # Imported here, for an audit only writes documents and does not need it.
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import best_match

    error = best_match(Draft202012Validator(schema()).iter_errors(document))
    if error is None:
        return ""
    place = ".".join(str(step) for step in error.absolute_path) or "the document"
    return f"{place}: {' '.join(error.message.split())[:LONGEST]}"


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number in JSON")
