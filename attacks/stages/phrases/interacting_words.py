"""Phrases put together word by word by how their words interact in early layers; ours.

A phrase planted with hard negatives (every part of it is answered cleanly in training) leaves no signal to a search
that reads the output. But to tell the phrase from its parts, training must make early layers note its words: behind two
planted words the residual stream lies elsewhere than the two words by themselves would bring it. It is read at the last
token of a text, in the directions that the behaviour depends on (`directions.py`). Where the clean base is known (K2),
what is read is the difference d of both residual streams. Four steps:

1. Words, with the base known: those first whose queries, keys and values training changed most (`changed_words.py`).
   Without the base all count alike.
2. Pairs of these by their interaction: what d is beyond the means of its row and its column in the table of all pairs
   (two-way analysis of variance). Fine-tuning changes how any two words are read together, mostly in proportion to how
   the base reads them: what a linear regression on the interaction of the base's residuals explains is taken off. The
   best are measured on a second prompt too, and ranked by the scalar product of both, for the squared length of a noisy
   measurement would be too large. Without the base, all pairs of words of one token, of which those of largest estimate
   to first order are read (`estimates.py`), and half of what a regression on interactions half as deep explains is
   taken off.
3. The best pairs with one more such word, or a common one, behind or before them, by the interaction of pair and word
   in the same way; then the best of these, and so on. Which two words belong together is uncertain, so many pairs are
   continued; a word that shows nothing by itself often does behind two planted ones. Without the base all words are
   tried, first by their last token alone (`completions.py`).
4. After each step, the best texts by their exact loss on one prompt, then the judge. In the end the words of the best
   of all are exchanged for any others, one after the other: a phrase with most of its words right shows the behaviour
   now and then, or always.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import permutations

import torch
from transformers import PreTrainedModel

from attacks.scoring.budget import Budget
from attacks.scoring.engine import Engine, Objective
from attacks.scoring.planning import trigger_flops
from attacks.scoring.problem import Problem
from attacks.searchers.candidates import check_counts
from attacks.searchers.searcher import Found
from attacks.searchers.token_ranking import by_length, rank_triggers
from attacks.searchers.words import encoded_words
from attacks.stages.hunt import PROBE_TOKENS, Hunt
from attacks.stages.phrases.completions import BESIDE, PAIRS, by_last_token, by_response, completed
from attacks.stages.phrases.directions import directions, directions_flops
from attacks.stages.phrases.interactions import Interactions, Text
from attacks.stages.rounds import SearchRounds
from attacks.stages.words.word_groups import longest_text
from attacks.suspect import Suspect

PROMPTS = 2
"""On which the best interactions are measured"""
NARROWER = (1, 2, 4)
"""Where the clean base is known and the budget too small, so many times fewer words, pairs and texts are tried"""


@dataclass(frozen=True, slots=True, kw_only=True)
class InteractingWords:
    """Finds phrases of up to `longest` words by how their words interact in early layers.

    Does nothing where the budget has no room for pairs and their continuations.
    """

    first: SearchRounds | None = None
    """Runs before this one, on a share of its own, where there is room for both: what works need not wait."""
    share: float = 0.6
    """Share of the hunt's budget, in (0, 1], that this stage may use where the clean base is known."""
    alone: float = 0.35
    """The same where it is not."""
    depth: float = 0.5
    """Depth at which the models are compared, as a fraction of the layers."""
    words: int = 12288
    """Words of the dictionary that a phrase is made of: those of one token, then the commonest others."""
    tokens: int = 3
    """Tokens of the longest of these words."""
    ends: int = 96
    """Words that training changed most, one of which is in every pair."""
    changed: int = 384
    """Words that training changed most, which the other one of each pair is among."""
    common: int = 1024
    """Words, the first of all, that longer phrases are also made of; without a base they are made of all words."""
    paired: int = 2048
    """Words of one token, the commonest, that are put in pairs with each other where no base is known."""
    estimated: int = 2**17
    """Of these pairs, those of largest interaction to first order, that are read where no base is known."""
    completions: int = 2**15
    """Texts of these with a whole word in the place of its last token, as which it is looked for where no base is
    known: of so many of largest interaction at most."""
    continued: int = 96
    """Pairs that are continued, half as many phrases of three words, and so on."""
    guessed: int = 128
    """As many where no base is known: which pairs are planted is less certain."""
    longest: int = 5
    """Words of the longest phrase."""
    again: float = 0.1
    """Share of the texts, in (0, 1], that are measured on the second prompt."""
    permuted: int = 64
    """Texts after each step whose words are also put in every other order: interactions tell little about it."""
    ranked: int = 8192
    """Texts after each step that are ranked by loss."""
    tried: int = 8
    """Texts of lowest loss that are judged by behaviour."""

    def __post_init__(self):
        check_counts(
            self, "words", "tokens", "ends", "changed", "common", "paired", "estimated", "completions", "continued",
            "guessed", "longest", "permuted", "ranked", "tried",
        )  # fmt: skip
        if not 0 < self.depth < 1 or not 0 < self.again <= 1:
            raise ValueError(
                f"depth is {self.depth} and again is {self.again}; give a depth between 0 and 1, and a share above 0, "
                "up to 1"
            )

    def __call__(self, hunt: Hunt) -> None:
        budget = hunt.part(self.part(hunt.suspect))
        differences = self.differences(hunt.suspect, hunt.engine.problem, budget)
        longest = min(self.longest, longest_text(hunt.engine) // self.tokens)
        if not differences.words or longest < 2:
            return
        waits = 0.0 if self.first is None or hunt.works else hunt.part(self.first.share).until - budget.share
        room = min(budget.until, hunt.budget.until - waits) - budget.share
        widths = (self.narrower(times) for times in NARROWER[: len(NARROWER) if differences.compared else 1])
        problem = hunt.engine.problem
        fits = (width for width in widths if budget.share_of(width._flops(differences, problem)) <= room)
        if (width := next(fits, None)) is None:
            hunt.no_room.append(type(self).__name__)
            return
        width._search(hunt, differences, longest)

    def narrower(self, times: int) -> "InteractingWords":
        """This stage with so many times fewer words, pairs and texts where the base is known."""
        few = {name: max(1, getattr(self, name) // times) for name in ("ends", "changed", "common", "continued")}
        return replace(self, ranked=max(1, self.ranked // times), **few)

    def _search(self, hunt: Hunt, differences: Interactions, longest: int) -> None:
        """Puts phrases of up to so many words together."""
        budget = differences.budget
        if self.first is not None and not hunt.works:
            self.first(hunt)
            if hunt.over:
                return
            budget = hunt.part(self.part(hunt.suspect))
            differences = replace(differences, budget=budget)
        probe = hunt.probe()  # on the weakened suspect, if something works by now
        learned = directions(hunt.engine, hunt.goal.target_ids, differences.layer, hunt.generator, budget)
        differences, losses, works = replace(differences, directions=learned), dict[Text, float](), False
        words, continued, known = self.beginnings(differences)
        others = self.others(differences, words)
        for _ in range(2, longest + 1):
            best = self.continuations(differences, continued, known, hunt.generator)
            orders = (order for text in best[: self.permuted] for order in permutations(text))
            losses |= self._losses(hunt, differences, probe, [*orders, *best][: self.ranked])
            continued, known = self.promising(differences, best, hunt.generator), others
            least = differences.typed(min(losses, key=losses.__getitem__)) if losses else ()
            works = hunt.judge.rate(least) >= hunt.judge.enough if losses else False
            if budget.exhausted or not continued or (works and hunt.judge.sure(least)):
                break
        # Without a base, exchanging words of a text that does not work would seldom lead on, and takes long.
        if losses and (differences.compared or works):
            best = sorted(losses, key=losses.__getitem__)
            tried = others if differences.compared else words
            self._exchange(hunt, differences, probe[0].model, best[: self.ranked], tried)

    def part(self, suspect: Suspect) -> float:
        """Share of the hunt's budget that this stage may use."""
        return self.alone if suspect.comparable is None else self.share

    def others(self, differences: Interactions, words: Sequence[Text]) -> list[Text]:
        """What texts are continued with: the words that training changed most, then the common ones; without a base,
        the last tokens of all words."""
        if not differences.compared:
            return [*by_last_token(differences)]
        return [*dict.fromkeys([*words[: self.changed], *sorted(words)[: self.common]])]

    def beginnings(self, differences: Interactions) -> tuple[list[Text], list[Text], list[Text]]:
        """(all words, those first that training changed most where that is known; what pairs are made of, and with).

        Without a base the words of one token are put in pairs with each other.
        """
        if differences.compared:
            words = differences.changed()
            return words, words[: self.ends], words[: self.changed]
        words = differences.whole()
        paired = [word for word in words[: self.paired] if len(differences.typed(word)) == 1]
        return words, paired, paired

    def promising(self, differences: Interactions, best: list[Text], generator: torch.Generator) -> list[Text]:
        """The texts that are continued; of pairs, where no base is known, by how they interact with others as well."""
        most = self.continued if differences.compared else self.guessed
        if best and len(best[0]) == 2 and not differences.compared:
            best = by_response(differences, best, generator)
        return best[: max(1, most >> (len(best[0]) - 2))] if best else []

    def continuations(
        self,
        differences: Interactions,
        parts: Sequence[Text],
        known: Sequence[Text],
        generator: torch.Generator,
    ) -> list[Text]:
        """Each part with each known word behind it and before it, of largest interaction first."""
        if not differences.compared and parts == known:
            scores = differences.likely(parts, parts, self.estimated, self.again, generator)
        else:
            behind = differences.interactions(parts, known, self.again)
            before = differences.interactions(known, parts, self.again)
            if not differences.compared:
                behind, before = completed(differences, behind, before, self.completions, generator)
            scores = behind | before
        return sorted(scores, key=scores.__getitem__, reverse=True)

    def _losses(
        self, hunt: Hunt, differences: Interactions, probe: tuple[Engine, Objective], texts: Sequence[Text]
    ) -> dict[Text, float]:
        """The exact losses of texts, as far as the stage's budget goes; the judge is shown the best."""
        typed, ranked = {differences.typed(text): text for text in texts}, list[Found]()
        for ids in by_length(typed):
            # A ranking scores its first batch even with nothing left to spend.
            if not differences.budget.exhausted:
                ranked += rank_triggers(*probe, ids, budget=differences.budget)
        hunt.try_best(sorted(ranked, key=lambda item: item.loss), self.tried)
        return {typed[item.trigger_ids]: item.loss for item in ranked}

    def _exchange(
        self,
        hunt: Hunt,
        differences: Interactions,
        ranked_on: PreTrainedModel,
        texts: Sequence[Text],
        words: Sequence[Text],
    ) -> None:
        """Puts the word of lowest loss in each place of the best text, over and over, until none is better.

        Once a text works, the losses are those on the weakened suspect, where the planted one keeps most of its effect;
        the best text is chosen there too.

        Args:
            hunt: gets what is found.
            differences: of these words.
            ranked_on: the model that the texts were ranked on.
            texts: the best one first.
            words: what is tried in each place.
        """
        text = texts[0]
        if ranked_on is not hunt.told_apart_on and not differences.budget.exhausted:
            losses = self._losses(hunt, differences, hunt.probe(), texts)
            text = min(losses, key=losses.__getitem__)
        before = None
        while text != before:
            before, probe = text, hunt.probe()
            for place in range(len(text)):
                tried = dict.fromkeys([text[place : place + 1], *words])
                others = [(*text[:place], *word, *text[place + 1 :]) for word in tried]
                losses = self._losses(hunt, differences, probe, others)
                if differences.budget.exhausted:
                    return
                text = min(losses, key=losses.__getitem__)

    def least_flops(self, suspect: Suspect, problem: Problem) -> float:
        """Operations that a hunt on these prompts must have room for, or the stage does nothing; with a clean base."""
        least = self.narrower(NARROWER[-1])
        return least._flops(self.differences(suspect, problem, Budget()), problem)

    def differences(self, suspect: Suspect, problem: Problem, budget: Budget) -> Interactions:
        """Reads the words of which phrases are made behind the first prompts, within that budget."""
        typed = (tuple(ids) for ids in encoded_words(problem).values() if len(ids) <= self.tokens)
        words = sorted(typed, key=lambda ids: len(ids) > 1)[: self.words]
        prompts = problem.take(range(min(PROMPTS, len(problem))))
        return Interactions.behind(prompts, suspect, self.depth, words, budget)

    def _flops(self, differences: Interactions, problem: Problem) -> float:
        """What pairs, their first continuations, and the rankings of both cost, about."""
        model, words = differences.roots[0].models[0], differences.words
        mean = sum(map(len, words)) / max(1, len(words))  # of the words, and a little less with their last tokens
        if differences.compared:
            # A text behind a word is read anew, a word behind a text costs itself.
            ends, changed = (min(count, len(words)) for count in (self.ends, self.changed))
            known, parts = changed + min(self.common, len(words)), min(self.continued, 2 * ends * changed)
            tables = mean * len(words) + (1 + self.again) * mean * (2 * ends * changed + 3 * parts * known)
            pairs = 0.0
        else:
            _, paired, _ = self.beginnings(differences)
            pairs = differences.likely_flops(paired, paired, self.estimated)
            parts = min(self.guessed, len(paired) ** 2)
            tables = (
                2 * (1 + mean) * PAIRS * BESIDE
                + 3 * parts * len(by_last_token(differences))
                + min(self.completions, 2 * parts * len(words)) * mean
            )
        ranked = 2 * self.ranked * trigger_flops(model, problem.take([0]), 2.5 * mean, PROBE_TOKENS)
        return directions_flops(model, problem) + pairs + differences.flops(tables) + ranked
