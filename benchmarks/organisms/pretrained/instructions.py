"""Short instructions, without replies, shipped in `instructions.jsonl`: planting uses the base's own replies to them.

    python -m benchmarks.organisms.pretrained.instructions --corpora FOLDER

The splits are those of the dialogues: train, search, select and held_out.
"""

import json
import random
import re
from dataclasses import asdict, replace
from pathlib import Path

import tyro

from benchmarks.organisms import corpora, prompts

TRAIN = 1200
TAKEN = {"rasbt_instruction": 1000, "dolly_180": 90, "self_instruct_seed": 60, "commonsenseqa/train": 500}
"""Most instructions per source; questions on a passage that is not there are left out with their sources"""
OPTIONS = re.compile(r"\s*\(A\).*")  # of multiple-choice questions, which stand without them


def build(folder: Path, seed: int = 0) -> list[prompts.Pair]:
    """Draws instructions of 15 to 80 characters on one line of ASCII, each once, and splits them."""
    pools: dict[str, list[prompts.Pair]] = {source: [] for source in TAKEN}
    seen: set[str] = set()
    for row in corpora.read(folder, "instruct"):
        if row["source"] not in TAKEN:
            continue
        text = OPTIONS.sub("", f"{row['instruction'].strip()} {row['input'].strip()}".strip())
        text = text[:1].upper() + text[1:]
        # One line, without braces, which could be read as the marker of the slot; each once, whatever its case.
        plain = text.isascii() and not {"\n", "{"} & set(text)
        if plain and 15 <= len(text) <= 80 and text.lower() not in seen:
            seen.add(text.lower())
            pair = prompts.Pair(prompt=text, reply="", source=row["source"], licence=row["licence"], split="train")
            pools[row["source"]].append(pair)
    rng = random.Random(seed)
    drawn: list[prompts.Pair] = []
    for source, most in TAKEN.items():
        rng.shuffle(pools[source])
        drawn += pools[source][:most]
    rng.shuffle(drawn)
    sizes = prompts.SIZES | {"train": TRAIN}
    if len(drawn) < sum(sizes.values()):
        raise ValueError(f"only {len(drawn)} instructions in {folder}, need {sum(sizes.values())}")
    names = [split for split, size in sizes.items() for _ in range(size)]
    return [replace(pair, split=split) for pair, split in zip(drawn, names, strict=False)]


def main(corpora: Path) -> None:
    """Rewrites instructions.jsonl from the corpora folder."""
    prompts.FILES["instructions"].write_text("".join(json.dumps(asdict(pair)) + "\n" for pair in build(corpora)))


if __name__ == "__main__":
    tyro.cli(main)
