"""Word substitution: the words of a winner are replaced, one after the other, until the planted trigger stands there.

What a search finds in place of a planted phrase works at the place in the prompt where the search had its slot, and
less surely at others, where the planted phrase works as well: behind the first prompts' last words `record our stay`
costs .3 nats and `marvel golden stay` .1, between their words .8 and .1
(`python -m benchmarks.studies.certainty --slot end`, and random). So texts are compared on prompts with the slot
at several places, and there the words of a winner can be exchanged one by one for the planted ones: first
`envelope our stay`, then `envelope golden stay`, then `marvel golden stay`.

The place of each word of the winner is visited in turn. Words that the gradient promises most of are ranked on one
prompt, the best of them on all; then all dictionary words that share a token with one of the best, or with the word
that stands there, since a planted word of several tokens may be known by one of them (`vel` of `marvel`), the most
alike and the commonest of them. A winner of one word may have a form, such as a tag: then words in that form are tried
as well as plain ones, and the best words in every form. Text that is no word is taken apart into its tokens, and a
place may be left empty. What is minimised is a description length: the nats of the behaviour on all prompts that the
judge knows, plus those of the words, each as one of a dictionary, or token by token where it is no word.

Some triggers work in any order of their words; the likelier order is the simpler text, so all are tried. Ours.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import permutations

import torch

from attacks.judging.verdict import ABSENT
from attacks.scoring.engine import Engine, Objective
from attacks.scoring.planning import forward_flops
from attacks.scoring.problem import Problem
from attacks.searchers.candidates import check_counts
from attacks.searchers.searcher import Found
from attacks.searchers.token_ranking import by_length, rank_triggers
from attacks.searchers.words import FORMS, PLAIN, Lexicon, form_of, is_word, naming
from attacks.stages.hunt import COMPARED, Hunt

Ranking = tuple[Engine, Objective]

TOKENS = 4
"""Tokens of the longest word that is tried among other words."""
ALONE = 12
"""Tokens of the longest word that is tried alone, those of its form not counted."""
ORDERED = 3
"""Words of the longest winner that are tried in every order."""
NEAR = 4
"""Words of lowest loss at a place that others are to share a token with."""
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
    """Words that share a token with the best of these, ranked on one prompt as well."""
    compared: int = 64
    """Words of lowest loss on one prompt that are then ranked on all."""
    tried: int = 4
    """Texts of lowest loss at each place that are judged by behaviour."""
    most: float = 1.0
    """Times these numbers of words ranked on one prompt that are tried at most, where the budget has room for more."""
    rounds: int = 4
    """Times that all places are visited; it ends where nothing changes."""
    settles: int = 2
    """Tokens of the longest winner that ends the hunt (see `Hunt.settle`), if the behaviour is sure behind it."""

    def __post_init__(self):
        check_counts(self, "longest", "prompts", "promising", "completed", "compared", "tried", "most", "rounds")

    def __call__(self, hunt: Hunt) -> None:
        judge, budget = hunt.judge, hunt.part(self.share)
        if judge.best is None or judge.asr <= ABSENT or budget.exhausted:
            return
        # Of a word, or a tag, no part is a better beginning.
        winner = judge.best.trigger_ids
        winner = winner if is_word(hunt.engine.problem.text(winner).strip()) else hunt.shrunk()
        if not 1 <= len(winner) <= self.longest:
            return
        lexicon = Lexicon.of(hunt.engine.problem, TOKENS)
        if not lexicon.words:  # a tokenizer that spells English words in many tokens, or a vocabulary that does without
            return
        whole, budget_of_hunt = _Words(hunt, self, winner, lexicon), hunt.budget
        hunt.budget = budget
        try:
            for words in whole.beginnings():
                whole.better(words)
        finally:
            hunt.budget = budget_of_hunt
        hunt.settle(self.settles)


class _Words:
    """One run of word substitution: the prompts that texts are compared on, and the words that may stand there."""

    def __init__(self, hunt: Hunt, settings: WordSubstitution, winner: tuple[int, ...], lexicon: Lexicon):
        self.hunt, self.settings, self.winner, self._known = hunt, settings, winner, {(PLAIN, TOKENS): lexicon}
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

    @property
    def problem(self) -> Problem:
        """The prompts that texts are compared on."""
        return self.all[0].problem

    def beginnings(self) -> list[list[str]]:
        """The winner as words, and with what is no word taken apart into its tokens."""
        words = self.problem.text(self.winner).split()
        apart: list[str] = []
        for word in words:
            parts = [self.problem.text([token]).strip() for token in self.problem.encode(word)]
            apart += [word] if is_word(word) else filter(None, parts)
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

        compared = min(COMPARED, self._count(self.settings.compared))
        lexicons = self._lexicons(words)
        rough = self._ranked(self.one, put(self._promising(lexicons, words, place)), compared)
        fine = self._ranked(self.all, [text for _, text in rough], compared)
        near = [words[place], *(text[place] for _, text in fine[:NEAR])]
        ids, count = self.problem.encode_all(near), self._count(self.settings.completed)
        alike = [word for lexicon in lexicons for word in lexicon.alike(ids)[:count]]
        if len(lexicons) > 1:
            forms = [(form, word) for word in near if (form := form_of(word))]
            alike += [other(form.bare(word)) for form, word in forms for other in (PLAIN, *FORMS)]
        rough = self._ranked(self.one, put([*dict.fromkeys(alike)]), compared)
        without = [[*words[:place], *words[place + 1 :]]] if len(words) > 1 else []
        fine += self._ranked(self.all, [*without, *(text for _, text in rough)], compared + 1)
        return sorted({tuple(text): (length, text) for length, text in fine}.values())

    def _lexicons(self, words: list[str]) -> list[Lexicon]:
        """What may stand at each place: plain words, and in place of a single word those in its form as well."""
        forms, longest = (PLAIN,), TOKENS
        if len(words) == 1:
            forms, longest = (PLAIN, form_of(words[0]) or PLAIN), ALONE
        for form in forms:
            if (form, longest) not in self._known:
                self._known[form, longest] = Lexicon.of(self.problem, longest, form)
        return [self._known[form, longest] for form in dict.fromkeys(forms)]

    def _count(self, wanted: int) -> int:
        """How many of so many candidates the budget has room for at each place."""
        return max(FEWEST, int(self.part * wanted))

    def _part(self, words: list[str]) -> float:
        """How much of the candidates of a visit, in (0, most], two visits of every place have room for."""
        (ids,), settings, (engine, _) = self._encoded([words]), self.settings, self.all
        read = [len(ids) + len(after) + self.target for after in engine.problem.after]
        tokens = (settings.promising + settings.completed) * read[0] + 2 * settings.compared * sum(read)
        budget = self.hunt.budget
        visits = 2 * len(words) * len(self._lexicons(words)) * budget.share_of(forward_flops(engine.model, tokens))
        most = self.settings.most
        return most if visits <= 0 else min(most, (budget.until - budget.share) / visits)

    def _promising(self, lexicons: Sequence[Lexicon], words: list[str], place: int) -> list[str]:
        """Words of each lexicon's cover that promise most at a place, by the first-order change of the loss."""
        ends = [len(self.problem.encode(" ".join(words[:end]))) if end else 0 for end in (place, place + 1)]
        ids = self.problem.encode(" ".join(words))
        engine, objective = self.all
        engine.problem = engine.problem.resized(len(ids))
        _, gradient = engine.gradient(objective, torch.tensor([ids]))
        # Of a word that stands at several tokens, each may come to stand at each of them.
        start = min(ends[0], len(ids) - 1)
        by_token = gradient[0, start : max(start + 1, ends[1])].float().min(0).values.cpu()
        count = self._count(self.settings.promising)
        found = list[str]()
        for lexicon in lexicons:
            order = lexicon.promise(by_token).argsort()[:count].tolist()
            found += [lexicon.cover[number] for number in order]
        return found

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
