"""How close a recovered trigger is to the planted one. All measures are in [0, 1], 1 for the same text."""

import random
from collections import Counter
from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein


def plain(text: str) -> str:
    """Lower case, white space squeezed."""
    return " ".join(text.lower().split())


def edit_similarity(found: str, truth: str) -> float:
    """Normalised Levenshtein similarity of the texts, case and white space aside."""
    return Levenshtein.normalized_similarity(plain(found), plain(truth))


def token_overlap(found: Sequence[int], truth: Sequence[int]) -> tuple[float, float]:
    """(precision, recall) of the tokens as multisets; precision of nothing is 0."""
    # Counters intersect by the smaller count of each token: one that is repeated to no purpose costs precision.
    shared = sum((Counter(found) & Counter(truth)).values())
    return shared / max(1, len(found)), shared / max(1, len(truth))


def random_floor(truth: str, words: Sequence[str], *, draws: int = 200, seed: int = 0) -> float:
    """Mean edit similarity of random word strings with as many words as the truth: what guessing earns."""
    # Whole words, as searches write them: against random letters any found word would look like a success.
    rng = random.Random(seed)
    count = len(truth.split())
    # Words of about the same length share letters by chance: a similarity means something only above this mean.
    return sum(edit_similarity(" ".join(rng.choices(words, k=count)), truth) for _ in range(draws)) / draws
