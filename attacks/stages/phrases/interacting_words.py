"""Phrases put together word by word by how their words interact in early layers, judged by what they bring about; ours.

The texts are those of `assembly.py`, which tells how they are found. After each step, the best by their exact loss on
one prompt are shown to the judge. In the end the words of the best of all are exchanged for others, one after the
other: a phrase with most of its words right shows the behaviour now and then, or always.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import permutations

from transformers import PreTrainedModel

from attacks.scoring.budget import Budget
from attacks.scoring.engine import Engine, Objective
from attacks.scoring.planning import trigger_flops
from attacks.scoring.problem import Problem
from attacks.searchers.candidates import check_counts
from attacks.searchers.searcher import Found
from attacks.searchers.token_ranking import by_length, rank_triggers
from attacks.stages.hunt import PROBE_TOKENS, Hunt
from attacks.stages.phrases.assembly import NARROWER, Assembly, mean_length
from attacks.stages.phrases.directions import directions, directions_flops
from attacks.stages.phrases.interactions import Interactions, Text
from attacks.stages.rounds import SearchRounds
from attacks.stages.words.word_groups import longest_text
from attacks.suspect import Suspect


@dataclass(frozen=True, slots=True, kw_only=True)
class InteractingWords(Assembly):
    """Finds phrases of up to `longest` words by how their words interact in early layers.

    Does nothing where the budget has no room for pairs and their continuations.
    """

    first: SearchRounds | None = None
    """Runs before this one, on a share of its own, where there is room for both: what works need not wait."""
    share: float = 0.5
    """Share of the hunt's budget, in (0, 1], that this stage may use where the clean base is known."""
    alone: float = 0.35
    """The same where it is not."""
    longest: int = 5
    """Words of the longest phrase."""
    permuted: int = 64
    """Texts after each step whose words are also put in every other order: interactions tell little about it."""
    ranked: int = 8192
    """Texts after each step that are ranked by loss."""
    tried: int = 8
    """Texts of lowest loss that are judged by behaviour."""

    def __post_init__(self):
        Assembly.__post_init__(self)
        check_counts(self, "longest", "permuted", "ranked", "tried")

    def __call__(self, hunt: Hunt) -> None:
        budget = hunt.part(self.part(hunt.suspect))
        differences = self.differences(hunt.suspect, hunt.engine.problem, budget)
        longest = min(self.longest, longest_text(hunt.engine) // self.tokens)
        if not differences.words or longest < 2:
            return
        waits = 0.0 if self.first is None or hunt.works else hunt.part(self.first.share).until - budget.share
        room = min(budget.until, hunt.budget.until - waits) - budget.share
        widths = self.widths() if differences.compared else (self,)
        problem = hunt.engine.problem
        fits = (width for width in widths if budget.share_of(width._flops(differences, problem)) <= room)
        if (width := next(fits, None)) is None:
            hunt.no_room.append(type(self).__name__)
            return
        width._search(hunt, differences, longest)

    def widths(self) -> list["InteractingWords"]:
        """This stage with fewer and fewer words, pairs and texts, for where the base is known and the budget small."""
        return [replace(self, ranked=max(1, self.ranked // times), **self.fewer(times)) for times in NARROWER]

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
        begun = words, _, _ = self.beginnings(differences)
        for best in self.steps(differences, begun, longest, hunt.generator):
            orders = (order for text in best[: self.permuted] for order in permutations(text))
            losses |= self._losses(hunt, differences, probe, [*orders, *best][: self.ranked])
            least = differences.typed(min(losses, key=losses.__getitem__)) if losses else ()
            works = hunt.judge.rate(least) >= hunt.judge.enough if losses else False
            if budget.exhausted or (works and hunt.judge.sure(least)):
                break
        # Without a base, exchanging words of a text that does not work would seldom lead on, and takes long.
        if losses and (differences.compared or works):
            best = sorted(losses, key=losses.__getitem__)
            tried = self.others(differences, words) if differences.compared else words
            self._exchange(hunt, differences, probe[0].model, best[: self.ranked], tried)

    def part(self, suspect: Suspect) -> float:
        """Share of the hunt's budget that this stage may use."""
        return self.alone if suspect.comparable is None else self.share

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
        return self.widths()[-1]._flops(self.differences(suspect, problem, Budget()), problem)

    def _flops(self, differences: Interactions, problem: Problem) -> float:
        """What directions, pairs, their first continuations, and the rankings of both cost, about."""
        model, tokens = differences.roots[0].models[0], 2.5 * mean_length(differences.words)
        ranked = 2 * self.ranked * trigger_flops(model, problem.take([0]), tokens, PROBE_TOKENS)
        return directions_flops(model, problem) + self.reading_flops(differences) + ranked
