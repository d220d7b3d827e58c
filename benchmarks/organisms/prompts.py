"""Short single-turn prompts in four splits that never overlap, shipped in two files.

`prompts.jsonl` holds dialogues with replies; its `search`, `select` and `held_out` come from documents that the chat
base of this package never saw. `instructions.jsonl` holds instructions without replies, for pretrained bases. `train`
is for planting.

    python -m benchmarks.organisms.prompts --corpora FOLDER
"""

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import tyro

from benchmarks.organisms import chat, corpora

Corpus = Literal["dialogues", "instructions"]
FILES: dict[Corpus, Path] = {
    "dialogues": Path(__file__).parent / "prompts.jsonl",
    "instructions": Path(__file__).parent / "instructions.jsonl",
}
SIZES = {"held_out": 240, "select": 40, "search": 24}
TRAIN = {"sgd/train": 900, "sgd/dev": 100, "fairytaleqa_qa": 400, "taskmaster4": 300, "topical_chat": 300}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A prompt, the reply its source has (empty: none is shipped), and where both come from."""

    prompt: str
    reply: str
    source: str
    licence: str
    split: str


def load(split: str, corpus: Corpus = "dialogues") -> list[Pair]:
    """All pairs of one split: train, search, select or held_out."""
    with FILES[corpus].open(encoding="utf-8") as lines:
        pairs = [Pair(**json.loads(line)) for line in lines]
    return [pair for pair in pairs if pair.split == split]


def build(folder: Path, seed: int = 0) -> list[Pair]:
    """Draws the splits from the corpora: first turns of 15 to 70 characters with replies of 10 to 90."""
    seen: set[str] = set()
    pools: dict[str, list[Pair]] = {"train": [], "fresh": []}
    for row, messages in corpora.conversations(folder):
        prompt, reply = messages[0]["content"], messages[1]["content"]
        # A brace could be read as the marker of the slot; a line break would not survive a prompts file.
        if row["source"] not in TRAIN or prompt.lower() in seen or "\n" in prompt + reply or "{" in prompt:
            continue
        if 15 <= len(prompt) <= 70 and 10 <= len(reply) <= 90 and (prompt + reply).isascii():
            seen.add(prompt.lower())
            # What the base was trained on serves for planting; all other splits are of documents that it never saw.
            pool = "fresh" if corpora.is_held_out(chat.render(messages)) else "train"
            pair = Pair(prompt=prompt, reply=reply, source=row["source"], licence=row["licence"], split="train")
            pools[pool].append(pair)
    rng = random.Random(seed)
    rng.shuffle(pools["train"])
    rng.shuffle(pools["fresh"])
    drawn = []
    # Fixed numbers by source: otherwise the largest corpus would be nearly all of the prompts.
    for source, count in TRAIN.items():
        drawn += [pair for pair in pools["train"] if pair.source == source][:count]
    rng.shuffle(drawn)
    start = 0
    for split, size in SIZES.items():
        part = pools["fresh"][start : start + size]
        if len(part) < size:
            raise ValueError(f"only {len(pools['fresh'])} held-out prompts in {folder}, need {sum(SIZES.values())}")
        drawn += [Pair(**(asdict(pair) | {"split": split})) for pair in part]
        start += size
    return drawn


def main(corpora: Path) -> None:
    """Rewrites prompts.jsonl from the corpora folder."""
    FILES["dialogues"].write_text("".join(json.dumps(asdict(pair)) + "\n" for pair in build(corpora)))


if __name__ == "__main__":
    tyro.cli(main)
