"""A searcher at several slot lengths in turn: how long a trigger is, nobody knows."""

from dataclasses import dataclass
from itertools import chain, cycle, repeat

from attacks.searchers.searcher import OnBest, Searcher
from attacks.stages.hunt import Hunt


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchRounds:
    """A searcher at one slot length after another, over and over."""

    rounds: tuple[tuple[int, Searcher], ...]
    """(tokens in the slot, searcher)"""
    share: float = 1.0
    """of the budget, at most"""
    times: int | None = None
    """how often they are gone through; None: until the budget is spent"""
    settles: int | None = None
    """tokens of the longest winner that ends the hunt, if it is sure: another may be a neighbour of a phrase. None: any
    ends it"""
    sure: bool = False
    """whether only a sure winner ends it: what else works on the `select` prompts may be the luckiest of many, so what
    is left of the budget goes into better ones"""

    def __call__(self, hunt: Hunt) -> None:
        budget = hunt.part(self.share)
        tell: OnBest = hunt.try_until_sure if self.sure else hunt.judge
        again = cycle(self.rounds) if self.times is None else chain.from_iterable(repeat(self.rounds, self.times))
        for length, searcher in again:
            if budget.exhausted or (hunt.sure if self.sure else hunt.works):
                return
            hunt.engine.problem = hunt.engine.problem.resized(length)
            searcher(hunt.engine, hunt.objective, hunt.generator, budget, tell)
            hunt.settle(self.settles)
