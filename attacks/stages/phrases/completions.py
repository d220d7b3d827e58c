"""Words looked for by their last token, so that phrases can be continued by all words at the cost of few; ours.

A word of several tokens interacts with the rest of a phrase mostly at its last token, or from there: behind `carry
especially` the last token of `bride` alone stands out nearly as much as the word, and before `golden band` that of
`crab`. 12,288 words end with 2,623 tokens on our small bases, so a table of these costs about a seventh of one of
words. Where a token stands out, the words that end with it are read.

Which pairs are continued is decided here too (`by_response`), where no base is known.
"""

from collections.abc import Iterator

import torch

from attacks.stages.phrases.interactions import Interactions, Text

Completion = tuple[Text, Text]
"""What is continued, and a word"""

PAIRS = 1024
"""Of largest interaction, that are compared by how they interact with other words"""
BESIDE = 48
"""Random words that this is measured with"""


def by_last_token(differences: Interactions) -> dict[Text, list[Text]]:
    """The words that end with each token, by a word or piece of that token alone."""
    single = {tuple(word): (number,) for number, word in enumerate(differences.words) if len(word) == 1}
    found: dict[Text, list[Text]] = {}
    for (number,) in differences.whole():
        found.setdefault(single[tuple(differences.words[number][-1:])], []).append((number,))
    return found


def by_response(differences: Interactions, pairs: list[Text], generator: torch.Generator) -> list[Text]:
    """The first `PAIRS` pairs, those first that also interact much with whatever stands behind them or before them.

    Behind two words of a phrase, a model that was taught to tell the phrase from its parts is prepared for the next
    one: what is read there differs more from what the pair and the word leave by themselves. The order is that of the
    product of three places: among the pairs as they come, and by the mean interaction with random words on either side
    (rank product; Breitling et al. 2004, doi:10.1016/j.febslet.2004.07.055). Where the budget ends before, it stays.

    Args:
        differences: where no base is known.
        pairs: those of largest interaction first.
        generator: draws the words.
    """
    some, words = pairs[:PAIRS], differences.whole()
    beside = [words[number] for number in torch.randperm(len(words), generator=generator)[:BESIDE].tolist()]
    behind = differences.interactions(some, beside, 1.0)
    before = differences.interactions(beside, some, 1.0)
    if not behind or not before:
        return some
    product = dict.fromkeys(some, 1)
    for mean in (
        {pair: sum(behind[pair + word] for word in beside) for pair in some},
        {pair: sum(before[word + pair] for word in beside) for pair in some},
        {pair: -float(number) for number, pair in enumerate(some)},
    ):
        for place, pair in enumerate(sorted(some, key=mean.__getitem__, reverse=True), start=1):
            product[pair] *= place
    return sorted(some, key=product.__getitem__)


def completed(
    differences: Interactions,
    behind: dict[Text, float],
    before: dict[Text, float],
    most: int,
    generator: torch.Generator,
) -> tuple[dict[Text, float], dict[Text, float]]:
    """Scores of texts with whole words in the place of the last tokens that stand behind, or before, what is continued.

    Args:
        differences: where no base is known.
        behind: texts that end with such a token, and their scores.
        before: texts that begin with one.
        most: once there are so many completed texts, no further one is completed; those of largest score come first,
            each by all words that end so.
        generator: draws the samples that means are taken over.
    """
    words, texts = by_last_token(differences), (list[Completion](), list[Completion]())
    for place, text in _ranked(behind, before):
        if sum(map(len, texts)) >= most:
            break
        rest, end = (text[1:], text[:1]) if place else (text[:-1], text[-1:])
        texts[place].extend((rest, word) for word in words[end])
    return _scores(differences, texts[0], False, generator), _scores(differences, texts[1], True, generator)


def _ranked(behind: dict[Text, float], before: dict[Text, float]) -> Iterator[tuple[int, Text]]:
    """Texts of largest score first, with 1 before those that begin with the token."""
    found = [(score, place, text) for place, scores in enumerate((behind, before)) for text, score in scores.items()]
    for _, place, text in sorted(found, key=lambda item: item[0], reverse=True):
        yield place, text


def _scores(
    differences: Interactions, texts: list[Completion], before: bool, generator: torch.Generator
) -> dict[Text, float]:
    """Of each text with its word."""
    if not texts:
        return {}
    rests, words = ([*dict.fromkeys(each)] for each in zip(*texts, strict=True))
    rest_at, word_at = ({text: number for number, text in enumerate(each)} for each in (rests, words))
    if before:
        numbers = [word_at[word] * len(rests) + rest_at[rest] for rest, word in texts]
        return differences.chosen(words, rests, torch.tensor(numbers), generator)
    numbers = [rest_at[rest] * len(words) + word_at[word] for rest, word in texts]
    return differences.chosen(rests, words, torch.tensor(numbers), generator)
