"""The user messages of an audit: some drive the search, others choose its winner."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

BUILT_IN = Path(str(files("attacks") / "audit" / "data" / "prompts.jsonl"))
"""Ordinary messages that are used where the user gives none: 24 of small talk (ours), 22 questions of CommonsenseQA
(MIT), 15 instructions of rasbt's set and the seed tasks of self-instruct (Apache 2.0). Source and licence stand on each
line. They are mixed because it is not known what a model was trained on: models of dialogues show a planted reply
behind up to a third of the instructions without any trigger."""
FEWEST = 12
"""Prompts needed: some to search on, the rest to choose by"""
MOST = 64
"""Prompts used at most, as many as the benchmark's: two thirds of them judge every winner, which thousands make slow"""


def split(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """(search, select) prompts, a third and the rest; of more than MOST prompts, that many evenly spaced ones.

    Raises:
        ValueError: fewer than FEWEST.
    """
    if len(texts) < FEWEST:
        raise ValueError(f"got {len(texts)} prompts; give at least {FEWEST}")
    if len(texts) > MOST:
        texts = [texts[number * len(texts) // MOST] for number in range(MOST)]
    cut = len(texts) // 3 + 1
    return list(texts[:cut]), list(texts[cut:])
