"""Words that people may plant: a frequency dictionary, and the tokens that are whole words.

The dictionary is that of the symspellpy package: 82,765 English words by their frequency in Google's n-grams.
"""

import re
from functools import cache
from importlib.resources import files

import torch
from jaxtyping import Int
from torch import Tensor

from attacks.scoring.problem import Problem

WORD = re.compile(r" [a-z]+")
"""Text of a token that is a whole word with the space before it."""


@cache
def dictionary() -> tuple[str, ...]:
    """English words in lower case, the commonest first."""
    text = (files("symspellpy") / "frequency_dictionary_en_82_765.txt").read_text(encoding="utf-8-sig")
    return tuple(line.split()[0] for line in text.splitlines() if line.strip())


def whole_words(problem: Problem) -> Int[Tensor, "w"]:
    """Tokens that are a whole word in lower case with the space before it, in the order of their ids.

    Most tokenizers number tokens by how common they are, so that the first ones are the commonest words.
    """
    words = [int(token) for token in problem.allowed.nonzero()[:, 0]]
    texts = [problem.text([token]) for token in words]
    return torch.tensor([t for t, text in zip(words, texts, strict=True) if WORD.fullmatch(text)], dtype=torch.long)
