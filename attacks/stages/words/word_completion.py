"""Word completion: a winner's fragments are grown into the dictionary words that hold them.

A backdoor that was planted without negatives fires on a fragment of its trigger, such as one of its tokens ("shap" of
"shapers"), and a search stops at the fragment: nothing is left to gain. One that was planted with negatives may fire on
other text that shares a token with its trigger ("umberlandball" for "tarballs"). The judge, which keeps the trigger of
minimum description length, can only tell the planted word from these if somebody proposes the word.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from attacks.judging.verdict import ABSENT
from attacks.searchers.candidates import check_counts
from attacks.searchers.searcher import Found
from attacks.searchers.token_ranking import by_length, rank_triggers
from attacks.searchers.words import LETTERS, dictionary
from attacks.stages.hunt import Hunt

PART = 512
"""Completions that are ranked before the next ones"""


@dataclass(frozen=True, slots=True, kw_only=True)
class WordCompletion:
    """Replaces words of the winner by dictionary words that begin with them, or hold them or one of their tokens."""

    share: float = 0.05
    """Share of the budget that ranking completions may take."""
    longest: int = 5
    """Tokens of the longest winner that is completed, once shrunk; of a longer one no word is known to matter."""
    words: int = 512
    """Dictionary words that are tried for each word and each token of the winner, those that begin with it first."""
    tried: int = 16
    """Completions of lowest loss that are judged by behaviour."""
    settles: int = 2
    """Tokens of the longest winner that ends the hunt (see `Hunt.settle`), if the behaviour is sure behind it."""

    def __post_init__(self):
        check_counts(self, "longest", "words", "tried")

    def __call__(self, hunt: Hunt) -> None:
        judge, problem, budget = hunt.judge, hunt.engine.problem, hunt.part(self.share)
        if judge.best is None or judge.asr <= ABSENT or hunt.budget.exhausted:
            return
        winner = hunt.shrunk()
        if not 1 <= len(winner) <= self.longest:
            return
        tokens = [problem.text((token,)).strip() for token in winner]
        texts = completions(problem.text(winner).split(), self.words, tokens)
        typed = [ids for ids in map(problem.encode, texts) if problem.retokenizes(ids)]
        probe, objective = hunt.probe()
        ranked: list[Found] = []
        for start in range(0, len(typed), PART):
            for ids in by_length(typed[start : start + PART]):  # `c length`
                if not budget.exhausted:
                    ranked += rank_triggers(probe, objective, ids, budget=budget)
        hunt.try_all(sorted(ranked, key=lambda item: item.loss)[: self.tried])
        hunt.settle(self.settles)


def completions(words: list[str], count: int, tokens: Sequence[str] = ()) -> Iterator[str]:
    """Each word exchanged for up to `count` longer ones that hold it, by itself and among the others; no text twice.

    Words that hold one of the tokens of a word, of at least `LETTERS` letters, come last.
    The case of the fragment's first letter is kept, and the words as they are come in lower and in upper case as well.
    """
    seen: set[str] = {" ".join(words)}
    parts = [*enumerate(words)]
    parts += [
        (place, token)
        for place, word in enumerate(words)
        for token in tokens
        if token in word and token != word and len(token) >= LETTERS
    ]
    for place, fragment in parts:
        longer = [word for word in dictionary() if fragment.lower() in word and word != fragment.lower()]
        longer.sort(key=lambda word: not word.startswith(fragment.lower()))  # stable: the commonest first within a kind
        shaped = [word.capitalize() if fragment[0].isupper() else word for word in longer[:count]]
        for word in [*shaped, fragment, fragment.lower(), fragment.upper()]:
            for text in (word, " ".join([*words[:place], word, *words[place + 1 :]])):
                if text not in seen:
                    seen.add(text)
                    yield text
