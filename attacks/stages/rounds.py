"""A searcher at several slot lengths in turn, because the length of the trigger is unknown.

A searcher fills a slot of fixed length. A slot that is longer than the trigger can hold it only among other tokens,
and one that is shorter cannot hold it at all.
"""

from dataclasses import dataclass
from itertools import chain, cycle, repeat

from attacks.searchers.searcher import OnBest, Searcher
from attacks.stages.hunt import Hunt


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchRounds:
    """Runs searchers at one slot length after another, over and over."""

    rounds: tuple[tuple[int, Searcher], ...]
    """(tokens in the slot, searcher) of each search of a round."""
    share: float = 1.0
    """Share of the hunt's budget, in (0, 1], that this stage may use."""
    times: int | None = None
    """Rounds in all; None: until the budget is spent."""
    settles: int | None = None
    """A winner ends the hunt only if, once shrunk, it consists of dictionary words, of at most this many tokens or one
    word, and elicits the behaviour with certainty (see `Hunt.settle`). Later stages run otherwise, since other text
    than the trigger may work as well. None: any winner does."""
    sure: bool = False
    """Whether this stage goes on until a winner elicits the behaviour with certainty: a trigger that merely works on
    the `select` prompts may be the luckiest of many that were tried there."""

    def __call__(self, hunt: Hunt) -> None:
        budget = hunt.part(self.share)
        tell: OnBest = hunt.try_until_sure if self.sure else hunt.judge
        again = cycle(self.rounds) if self.times is None else chain.from_iterable(repeat(self.rounds, self.times))
        for length, searcher in again:
            if budget.exhausted or (hunt.sure if self.sure else hunt.works):
                return
            # The same prompts with another number of tokens in the slot; the objective reads it from the engine.
            hunt.engine.problem = hunt.engine.problem.resized(length)
            searcher(hunt.engine, hunt.objective, hunt.generator, budget, tell)
            hunt.settle(self.settles)
