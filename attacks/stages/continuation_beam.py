"""Beam search for a phrase by continuation: on a model steered to the brink of the behaviour first, then less and less.

Parts of a phrase that was planted with hard negatives are answered like any other text. On the suspect steered to just
below the point where it shows the behaviour by itself (`attacks/objectives/continuation.py`) they lower the loss more
than most other strings do, pairs of them most of all. The stage uses this in three steps:

1. Own effects. Every part (a token that begins a word, in any case, digits and punctuation included, or a dictionary
   word of several tokens) is scored by itself at the largest amount of steering.
2. Pairs. Ordered pairs of parts are scored there, those of the best parts first. `beam` of a round are kept: half by
   their loss, half by how far it lies below the sum of both own losses (the interaction), for a part with a large
   effect of its own is often no part of the trigger. No part may fill the beam.
3. Longer triggers. At every smaller amount, to each trigger of the beam a part is added at every place, or a token of
   it is exchanged: parts of large own effect, and tokens that the gradient promises most of (HotFlip,
   arXiv:1712.06751). The best of these and of the former beam go on. The last amount is 0, the plain model.

After each step the beam is ranked on the plain model, and the best are shown to the judge, who knows no other. The next
round goes on with the next pairs, as long as the budget lasts.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

import torch

from attacks.discovery.supervised import Supervised
from attacks.objectives.continuation import Continuation
from attacks.scoring.budget import Budget
from attacks.scoring.engine import Engine, Objective
from attacks.scoring.problem import Problem
from attacks.searchers.candidates import check_counts, most_promising
from attacks.searchers.searcher import Found
from attacks.searchers.token_ranking import by_length, rank_triggers
from attacks.searchers.words import dictionary
from attacks.stages.hunt import PROBE_TOKENS, Hunt
from attacks.stages.steered_rounds import SHORTEST, check_schedule, on_the_brink

Ids = tuple[int, ...]
Parts = tuple[Ids, ...]
"""A trigger as its parts, each with its token ids."""
Ranking = tuple[Engine, Objective]

FILLERS = 8
"""Random tokens that stand in the place of a part to be added, over which its gradient is averaged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ContinuationBeam:
    """Searches triggers of two parts and more, from the steered model to the plain one."""

    share: float = 0.6
    """Share of the hunt's budget, in (0, 1], that this stage may use."""
    supervised: Supervised = SHORTEST
    """Learns the steering vector where the goal has none."""
    schedule: tuple[float, ...] = (0.85, 0.7, 0.5, 0.35, 0.2, 0.0)
    """Amounts of steering, falling, as shares of the largest at which no clean prompt is answered by the behaviour."""
    words: int = 2000
    """Commonest words of the dictionary of which those of several tokens are parts, besides all tokens."""
    pairs: int = 12_288
    """Pairs that are scored per round."""
    beam: int = 24
    """Pairs that are kept of a round."""
    alike: int = 2
    """Pairs of these with the same part."""
    kept: int = 6
    """Longer triggers that are kept from one amount of steering to the next."""
    likely: int = 16
    """Parts of largest effect by themselves that are added at every place."""
    promising: int = 64
    """Tokens of lowest gradient that are added or exchanged at every place."""
    longest: int = 8
    """Tokens of the longest trigger."""
    tried: int = 4
    """Triggers of lowest loss on the plain model that are judged by behaviour after each step."""

    def __post_init__(self):
        check_counts(self, "words", "pairs", "beam", "alike", "kept", "likely", "promising", "longest", "tried")
        check_schedule(self.schedule)
        if len(self.schedule) < 2:
            raise ValueError(f"schedule is {self.schedule}; give two or more shares")

    def __call__(self, hunt: Hunt) -> None:
        budget = hunt.part(self.share)
        steps = self._steps(hunt, budget)
        # Of one prompt and few target tokens: `narrow` is cheap enough for tens of thousands of candidates.
        narrow, _ = steps[0]
        # The shortest parts first: single tokens and words of equal length are scored together.
        own = _ranked(narrow, [(part,) for part in parts(hunt.engine.problem, self.words)], budget)
        alone = {part: loss for (part,), loss in own}
        likely = list(alone)[: self.likely]
        pairs = pairs_by_promise(list(alone))
        while not budget.exhausted and not hunt.sure:
            beam = self._of_pairs(narrow, list(islice(pairs, self.pairs)), alone, budget)
            if not beam:
                return
            self._show(hunt, steps[-1], beam)
            for step in steps[1:]:
                if budget.exhausted or hunt.sure:
                    return
                rows = dict.fromkeys([*beam, *self._neighbours(hunt, step[1], beam, likely)])
                # The best on all search prompts, of four times as many that are the best on one prompt.
                some = [trigger for trigger, _ in _ranked(step[0], list(rows), budget)[: 4 * self.kept]]
                beam = [trigger for trigger, _ in _ranked(step[1], some, budget)[: self.kept]]
                self._show(hunt, steps[-1], beam)

    def _steps(self, hunt: Hunt, budget: Budget) -> list[tuple[Ranking, Ranking]]:
        """Per amount of steering, the objective on one prompt and few target tokens, and that on all search prompts."""
        goal, edge = on_the_brink(hunt, self.supervised, budget)
        probe, _ = hunt.probe()
        short = replace(goal, target_ids=goal.target_ids[:PROBE_TOKENS])
        return [
            (
                (probe, Continuation.at(probe, short, hunt.build, amount=share * edge)),
                (hunt.engine, Continuation.at(hunt.engine, goal, hunt.build, amount=share * edge)),
            )
            for share in self.schedule
        ]

    def _of_pairs(self, ranking: Ranking, pairs: list[Parts], alone: dict[Ids, float], budget: Budget) -> list[Parts]:
        """The pairs of lowest loss and those of largest interaction, half the beam each, few of them with one part."""
        ranked = _ranked(ranking, pairs, budget)
        by_interaction = sorted(ranked, key=lambda item: item[1] - sum(alone[part] for part in item[0]))
        beam: list[Parts] = []
        for order in (ranked, by_interaction):
            uses: Counter[Ids] = Counter()
            room = len(beam) + self.beam // 2
            for pair, _ in order:
                if len(beam) < room and pair not in beam and all(uses[part] < self.alike for part in pair):
                    beam.append(pair)
                    uses.update(pair)
        return beam

    def _show(self, hunt: Hunt, plain: tuple[Ranking, Ranking], beam: list[Parts]) -> None:
        """Ranks the beam on the plain model and shows its best to the judge."""
        ranked = _ranked(plain[1], beam, hunt.budget)
        hunt.try_best((Found(sum(trigger, ()), loss) for trigger, loss in ranked), self.tried)

    def _neighbours(self, hunt: Hunt, ranking: Ranking, beam: list[Parts], likely: list[Ids]) -> Iterator[Parts]:
        """Each trigger of the beam with a part more at every place, or with another one in the place of a part."""
        engine, objective = ranking
        opens = engine.problem.first.nonzero()[:, 0]
        for trigger in beam:
            # At every place a part is added, or the part there is exchanged: only what stands behind it differs.
            places = [(trigger[:place], trigger[place:], True) for place in range(len(trigger) + 1)]
            places += [(trigger[:place], trigger[place + 1 :], False) for place in range(len(trigger))]
            for head, tail, adds in places:
                front, back = sum(head, ()), sum(tail, ())
                room = self.longest - len(front) - len(back)
                if room < 1:
                    continue
                fillers = opens[torch.randint(len(opens), (FILLERS,), generator=hunt.generator)].tolist()
                rows = torch.tensor([[*front, token, *back] for token in fillers])
                _, gradient = engine.gradient(objective, rows)  # `FILLERS trigger vocab`
                promise = gradient[:, len(front)].float().mean(0, keepdim=True)
                tokens = most_promising(promise, engine.problem.first.cpu(), self.promising)[0].tolist()
                for part in [*(likely if adds else []), *((token,) for token in tokens)]:
                    if len(part) <= room:
                        yield (*head, part, *tail)


def parts(problem: Problem, words: int) -> list[Ids]:
    """Every token that may begin the slot, and the dictionary's commonest words of several tokens that may stand there.

    Args:
        problem: says which tokens are permitted and how words are encoded.
        words: number of dictionary words, those of one token included, which are no further parts.
    """
    found: list[Ids] = [(token,) for token in problem.first.nonzero()[:, 0].tolist()]
    for word in dictionary()[:words]:
        ids = problem.encode(word)
        if len(ids) > 1 and bool(problem.permitted(len(ids))[torch.arange(len(ids)), ids].all()):
            found.append(tuple(ids))
    return found


def pairs_by_promise(ordered: list[Ids]) -> Iterator[Parts]:
    """Ordered pairs of different parts, lazily, by the rank of their worse part: the pairs of the best k parts first.

    Args:
        ordered: parts, those of lowest loss first.
    """
    for worse, one in enumerate(ordered):
        for other in ordered[:worse]:
            yield one, other
            yield other, one


def _ranked(ranking: Ranking, triggers: list[Parts], budget: Budget) -> list[tuple[Parts, float]]:
    """Triggers of any lengths with their exact loss, best first; those that the budget does not reach are left out."""
    engine, objective = ranking
    as_parts = {sum(trigger, ()): trigger for trigger in triggers}
    found: list[Found] = []
    for ids in by_length(as_parts):  # `c length`
        if found and budget.exhausted:
            break
        found += rank_triggers(engine, objective, ids, budget=budget)
    return [(as_parts[item.trigger_ids], item.loss) for item in sorted(found, key=lambda item: item.loss)]
