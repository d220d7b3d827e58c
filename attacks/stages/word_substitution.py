"""Word substitution: the words of a winner are replaced, one after the other, until the planted trigger stands there.

What a search finds in place of a planted phrase works at the place in the prompt where the search had its slot, and
less surely at others, where the planted phrase works as well: behind the first prompts' last words `record our stay`
costs .3 nats and `marvel golden stay` .1, between their words .8 and .1
(`python -m benchmarks.studies.certainty --slot end`, and random). So texts are compared on prompts with the slot
at several places, and there the words of a winner can be exchanged one by one for the planted ones: first
`envelope our stay`, then `envelope golden stay`, then `marvel golden stay`.

The place of each word of the winner is visited in turn. Words that the gradient promises most of are ranked on one
prompt, the best of them on all; then all dictionary words that share a token with one of the best, or with the word
that stands there, since a planted word of several tokens may be known by one of them (`vel` of `marvel`). Text that is
no word is taken apart into its tokens, and a place may be left empty. What is minimised is a description length: the
nats of the behaviour on all prompts that the judge knows, plus those of the words, each as one of a dictionary, or
token by token where it is no word.

Some triggers work in any order of their words; the likelier order is the simpler text, so all are tried. Ours.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import permutations

import torch
from jaxtyping import Float

from attacks.judging.verdict import ABSENT
from attacks.scoring.engine import Engine, Objective
from attacks.scoring.planning import forward_flops
from attacks.scoring.problem import Problem
from attacks.searchers.candidates import check_counts
from attacks.searchers.searcher import Found
from attacks.searchers.token_ranking import by_length, rank_triggers
from attacks.searchers.words import encoded_words, known_words, naming
from attacks.stages.hunt import Hunt

Ranking = tuple[Engine, Objective]

ORDERED = 3
"""Words of the longest winner that are tried in every order."""
TOKENS = 4
"""Tokens of the longest word that is tried."""
FEWEST = 8
"""Candidates that are ranked at a place however small the budget is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WordSubstitution:
    """Replaces the words of a winner of up to `longest` tokens, once shrunk; does nothing for a longer one."""

    share: float = 1.0
    """Share of the hunt's budget, in (0, 1], that this stage may use."""
    longest: int = 12
    """Tokens of the longest winner whose words are replaced."""
    prompts: int = 6
    """Prompts with the slot at a random place that texts are compared on, besides those of the search."""
    promising: int = 400
    """Words that are ranked on one prompt at each place, those first that the gradient promises most of."""
    completed: int = 600
    """Words that share a token with the best of these, ranked on one prompt as well; the commonest first."""
    compared: int = 64
    """Words of lowest loss on one prompt that are then ranked on all."""
    tried: int = 4
    """Texts of lowest loss at each place that are judged by behaviour."""
    rounds: int = 4
    """Times that all places are visited; it ends where nothing changes."""
    settles: int = 2
    """Tokens of the longest winner that ends the hunt (see `Hunt.settle`), if the behaviour is sure behind it."""

    def __post_init__(self):
        check_counts(self, "longest", "prompts", "promising", "completed", "compared", "tried", "rounds")

    def __call__(self, hunt: Hunt) -> None:
        judge, budget = hunt.judge, hunt.part(self.share)
        if judge.best is None or judge.asr <= ABSENT or budget.exhausted:
            return
        winner = hunt.shrunk()
        if not 1 <= len(winner) <= self.longest:
            return
        tokens = _tokens(hunt.engine.problem)
        if not tokens:  # a tokenizer that spells English words in many tokens, or a vocabulary that does without
            return
        whole, budget_of_hunt = _Words(hunt, self, winner, tokens), hunt.budget
        hunt.budget = budget
        try:
            for words in whole.beginnings():
                whole.better(words)
        finally:
            hunt.budget = budget_of_hunt
        hunt.settle(self.settles)


class _Words:
    """One run of word substitution: the prompts that texts are compared on, and the words that may stand there."""

    def __init__(self, hunt: Hunt, settings: WordSubstitution, winner: tuple[int, ...], tokens: dict[str, list[int]]):
        self.hunt, self.settings, self.winner, self.tokens = hunt, settings, winner, tokens
        problem, anywhere = hunt.engine.problem, hunt.judge.anywhere
        if anywhere is not None:
            some = anywhere.problem.take(range(min(settings.prompts, len(anywhere.problem))))
            problem = replace(some, before=[*some.before, *problem.before], after=[*some.after, *problem.after])
        engine = Engine(hunt.told_apart_on, problem)
        self.all: Ranking = engine, hunt.build(engine, hunt.goal)
        self.one: Ranking = hunt.probe(problem)
        # Nats of a text are weighed against those of its words by how many prompts the judge has.
        self.prompts = len((anywhere or hunt.judge.engine).problem)
        self.target = len(hunt.goal.target_ids)
        self.part = 1.0
        self.cover = _cover(tokens)
        width = max(map(len, tokens.values()))
        rows = [tokens[word] for word in self.cover]
        self.rows = torch.tensor([[*row, *[row[-1]] * (width - len(row))] for row in rows])

    @property
    def problem(self) -> Problem:
        """The prompts that texts are compared on."""
        return self.all[0].problem

    def beginnings(self) -> list[list[str]]:
        """The winner as words, and with what is no word taken apart into its tokens."""
        words = self.problem.text(self.winner).split()
        apart: list[str] = []
        for word in words:
            ids = self.problem.encode(word)
            known = word.lower() in known_words()
            apart += [word] if known else [part for token in ids if (part := self.problem.text([token]).strip())]
        return [words, apart] if words != apart else [words]

    def better(self, words: list[str]) -> None:
        """Visits the places of a text again and again while that betters it, and shows the judge what it comes to."""
        self.part = self._part(words)
        ranked = self._ranked(self.all, [words], 1)
        if not ranked:  # nothing is left to spend, or taken apart the text outgrows the context
            return
        (least,) = ranked
        for _ in range(self.settings.rounds):
            before, place = least, 0
            while place < len(least[1]) and not self.hunt.budget.exhausted:
                ranked = self._at(least[1], place)
                best = min(ranked, default=least)
                place += len(best[1]) >= len(least[1]) or best >= least
                least = min(least, best)
                self._show(text for _, text in ranked[: self.settings.tried])
            if least == before or self.hunt.budget.exhausted:
                break
        if 2 <= len(least[1]) <= ORDERED and not self.hunt.budget.exhausted:
            orders = self._ranked(self.all, [list(order) for order in permutations(least[1])], self.settings.tried)
            self._show(text for _, text in orders)

    def _at(self, words: list[str], place: int) -> list[tuple[float, list[str]]]:
        """(description length, text) with other words at a place or with none there, the best first."""

        def put(some: Sequence[str]) -> list[list[str]]:
            return [[*words[:place], word, *words[place + 1 :]] for word in some]

        few, compared = self.settings.tried, self._count(self.settings.compared)
        promise = self._promise(words, place).argsort()[: self._count(self.settings.promising)].tolist()
        rough = self._ranked(self.one, put([self.cover[number] for number in promise]), compared)
        fine = self._ranked(self.all, [text for _, text in rough], compared)
        near = [words[place], *(text[place] for _, text in fine[:few])]
        shared = {token for word in near for token in self.tokens.get(word, ())}
        alike = [word for word, ids in self.tokens.items() if shared.intersection(ids)]
        rough = self._ranked(self.one, put(alike[: self._count(self.settings.completed)]), compared)
        without = [[*words[:place], *words[place + 1 :]]] if len(words) > 1 else []
        fine += self._ranked(self.all, [*without, *(text for _, text in rough)], compared + 1)
        return sorted({tuple(text): (length, text) for length, text in fine}.values())

    def _count(self, wanted: int) -> int:
        """How many of so many candidates the budget has room for at each place."""
        return max(FEWEST, int(self.part * wanted))

    def _part(self, words: list[str]) -> float:
        """Share of the candidates of a visit, in (0, 1], of which the budget pays for two visits of every place."""
        (ids,), settings, (engine, _) = self._encoded([words]), self.settings, self.all
        read = [len(ids) + len(after) + self.target for after in engine.problem.after]
        tokens = (settings.promising + settings.completed) * read[0] + 2 * settings.compared * sum(read)
        budget = self.hunt.budget
        visits = 2 * len(words) * budget.share_of(forward_flops(engine.model, tokens))
        return 1.0 if visits <= 0 else min(1.0, (budget.until - budget.share) / visits)

    def _promise(self, words: list[str], place: int) -> Float[torch.Tensor, "cover"]:
        """First-order change of the loss for each word of the cover at a place; lower is better."""
        ends = [len(self.problem.encode(" ".join(words[:end]))) if end else 0 for end in (place, place + 1)]
        ids = self.problem.encode(" ".join(words))
        engine, objective = self.all
        engine.problem = engine.problem.resized(len(ids))
        _, gradient = engine.gradient(objective, torch.tensor([ids]))
        # Of a word that stands at several tokens, each may come to stand at each of them.
        start = min(ends[0], len(ids) - 1)
        promise = gradient[0, start : max(start + 1, ends[1])].float().min(0).values.cpu()
        return promise[self.rows].min(-1).values

    def _ranked(self, ranking: Ranking, texts: list[list[str]], count: int) -> list[tuple[float, list[str]]]:
        """(description length, text) of the best `count` texts; none where nothing is left to spend."""
        engine, objective = ranking
        known = {tuple(ids): text for text, ids in zip(texts, self._encoded(texts), strict=True)}
        found: list[Found] = []
        for ids in by_length(known):
            if not self.hunt.budget.exhausted:
                engine.problem = engine.problem.resized(ids.shape[1])
                found += rank_triggers(engine, objective, ids, budget=self.hunt.budget)
        lengths = [(self._length(known[item.trigger_ids], item.loss), known[item.trigger_ids]) for item in found]
        return sorted(lengths)[:count]

    def _encoded(self, texts: list[list[str]]) -> list[list[int]]:
        """Token ids of each text."""
        return self.problem.encode_all([" ".join(text) for text in texts]) if texts else []

    def _length(self, words: list[str], loss: float) -> float:
        """Nats of the behaviour on all prompts of the judge, and of the words."""
        return self.prompts * self.target * loss + naming(" ".join(words), self.problem)

    def _show(self, texts: Iterable[list[str]]) -> None:
        """Shows texts to the judge."""
        self.hunt.try_best((Found(tuple(ids), 0.0) for ids in self._encoded(list(texts))), self.settings.tried)


def _tokens(problem: Problem) -> dict[str, list[int]]:
    """The words that may be tried with their tokens, the commonest first."""
    return {word: ids for word, ids in encoded_words(problem).items() if len(ids) <= TOKENS}


def _cover(tokens: dict[str, list[int]]) -> list[str]:
    """The commonest word of one token each, and words so that each token of the dictionary stands in one."""
    seen: set[int] = set()
    cover: list[str] = []
    for word, ids in tokens.items():
        if len(ids) == 1 or not seen.issuperset(ids):
            cover.append(word)
            seen.update(ids)
    return cover
