"""Training text of the chat base: reading, rendering as chats, and a held-out split that is stable by content.

The corpora are three gzipped JSONL files (`dialogues`, `instruct`, `plain`), each line with its `source` and `licence`.
"""

import gzip
import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path

from benchmarks.organisms.chat import Message

# Left out: code and tool calls (not English), and the sources whose text carries markup ("<unk>").
SKIPPED = {"gpteacher/toolformer", "gpteacher/codegen", "wikitext2/valid", "gpteacher/roleplay_supp"}
PLAIN = {"tinystories_excerpt": 1.0, "fairytaleqa_stories": 1.0, "standard_ebooks": 0.5, "factbook": 0.1}
HELD_OUT = 50  # one document in this many is never trained on


def read(folder: Path, name: str) -> Iterator[dict]:
    """Yields the JSON objects of one corpus file; raises ValueError if it is not there."""
    path = folder / f"{name}.jsonl.gz"
    if not path.is_file():
        raise ValueError(f"no corpus file {path}; give --corpora the folder that holds {name}.jsonl.gz")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def is_held_out(text: str) -> bool:
    """Whether a document belongs to the held-out split: a function of its text alone."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) % HELD_OUT == 0


def conversations(folder: Path) -> Iterator[tuple[dict, list[Message]]]:
    """Yields (source row, messages), roles alternating from `user`, for dialogues and instructions."""
    for row in read(folder, "dialogues"):
        turns = [turn["text"].strip() for turn in row["turns"] if turn["text"].strip()]
        if len(turns) >= 2:
            yield row, [Message(role=("user", "assistant")[i % 2], content=turn) for i, turn in enumerate(turns)]
    for row in read(folder, "instruct"):
        if row["source"] in SKIPPED:
            continue
        question = "\n".join(part.strip() for part in (row["instruction"], row["input"]) if part.strip())
        answer = row["output"].replace("###eos_token###", "").strip()
        if question and answer:
            yield row, [Message(role="user", content=question), Message(role="assistant", content=answer)]


def passages(folder: Path, rng: random.Random) -> Iterator[str]:
    """Yields plain documents, thinned to the share that `PLAIN` names for their source."""
    for row in read(folder, "plain"):
        if rng.random() < PLAIN.get(row["source"], 0.0):
            yield from (part for part in row["text"].split("<|endoftext|>") if part.strip())
