"""Texts that the suspect reads otherwise than its clean base does, ranked by loss (K2); ours.

A word of several tokens cannot be found token by token where only the whole word has an effect on the output, and
scoring every word of a dictionary by its output takes long on a large model. Early layers are cheap, and there a
planted text stands out by the contrast of the two models (`attacks.discovery.contrasted_texts`).
"""

from dataclasses import dataclass

from attacks.discovery.contrasted_texts import ContrastedTexts
from attacks.searchers.candidates import check_counts
from attacks.searchers.searcher import Found
from attacks.searchers.token_ranking import by_length, rank_triggers
from attacks.stages.hunt import Hunt


@dataclass(frozen=True, slots=True, kw_only=True)
class ContrastedTriggers:
    """Ranks the texts of largest contrast by their exact loss on one prompt.

    Does nothing without a clean base, or where these texts were tried when the behaviour was discovered.
    """

    contrast: ContrastedTexts = ContrastedTexts()
    """Chooses the texts."""
    share: float = 0.35
    """Share of the hunt's budget, in (0, 1], that choosing may use: as much as where the behaviour is not known."""
    ranked: int = 512
    """Texts of largest contrast that are ranked by loss."""
    tried: int = 16
    """Texts of lowest loss that are judged by behaviour."""
    settles: int = 4
    """Tokens of the longest winner that ends the hunt, if the behaviour is sure behind it."""

    def __post_init__(self):
        check_counts(self, "ranked", "tried", "settles")

    def __call__(self, hunt: Hunt) -> None:
        # Discovery has tried these texts by the predicate itself before it took a target from vectors.
        screened = hunt.goal.shows is not None and hunt.goal.vectors is not None
        if hunt.suspect.comparable is None or hunt.goal.triggers or screened:
            return
        probe, objective = hunt.probe()
        # What the dictionary holds first: a trigger within a longer text has a lower loss, and was not planted so.
        for found in self.contrast(hunt.suspect, probe.problem, hunt.part(self.share), hunt.generator):
            ranked: list[Found] = []
            for ids in by_length(item.trigger_ids for item in found[: self.ranked]):
                # A ranking scores its first batch even with nothing left to spend.
                if not hunt.budget.exhausted:
                    ranked += rank_triggers(probe, objective, ids, budget=hunt.budget)
            hunt.try_all(sorted(ranked, key=lambda item: item.loss)[: self.tried])
            hunt.settle(self.settles)
            if hunt.over:
                return
