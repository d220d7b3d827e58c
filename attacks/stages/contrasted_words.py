"""Words that the suspect reads otherwise than its clean base does, before it answers otherwise (K2); ours.

A word of several tokens cannot be found token by token where only the whole word has an effect on the output, and
scoring every word of a dictionary by its output takes long on a large model. Early layers are cheap, and there already
the first token of a planted word stands out from other tokens by the difference of the two models' residuals.
"""

from collections import defaultdict
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from attacks.objectives.base_contrast import BaseContrast, engines_at_slot
from attacks.scoring.problem import Problem
from attacks.searchers.candidates import check_counts
from attacks.searchers.searcher import Found
from attacks.stages.dictionary import dictionary
from attacks.stages.hunt import Hunt
from attacks.stages.token_ranking import by_length, rank_triggers


@dataclass(frozen=True, slots=True, kw_only=True)
class ContrastedWords:
    """Ranks first tokens, then the words that begin so, by that difference, and the best by loss; needs the base."""

    share: float = 0.25
    """Share of the hunt's budget, in (0, 1], that this stage may use."""
    depths: tuple[float, ...] = (0.3, 0.4)
    """Depths at which the models are compared, as fractions of the layers."""
    words: int = 100_000
    """Words of the dictionary, the commonest first; fewer where it holds fewer."""
    others: int = 256
    """Random words that each is compared with."""
    firsts: float = 0.1
    """Share of the first tokens, in (0, 1], whose words are compared, those of largest difference."""
    ranked: int = 512
    """Words of largest difference that are ranked by their exact loss on one prompt."""
    tried: int = 16
    """Words of lowest loss that are judged by behaviour."""
    settles: int = 4
    """Tokens of the longest winner that ends the hunt, if the behaviour is sure behind it."""

    def __post_init__(self):
        check_counts(self, "words", "others", "ranked", "tried", "settles")
        if not self.depths or not all(0 < depth < 1 for depth in self.depths) or not 0 < self.firsts <= 1:
            raise ValueError(
                f"depths are {self.depths} and firsts is {self.firsts}; give depths between 0 and 1, and a share above "
                "0, up to 1"
            )

    def __call__(self, hunt: Hunt) -> None:
        probe, objective = hunt.probe()
        words = _by_first_token(probe.problem, self.words)
        engines = engines_at_slot(hunt.suspect, probe)
        if engines is None or not words:
            return
        budget = hunt.part(self.share)
        generator = hunt.generator

        def contrasted(candidates: Int[Tensor, "c length"]) -> list[Found]:
            drawn = candidates[torch.randint(len(candidates), (self.others,), generator=generator)]
            contrast = BaseContrast.among(*engines, drawn, self.depths)
            return rank_triggers(engines[0], contrast, candidates, budget=budget)

        firsts = contrasted(torch.tensor(list(words))[:, None])
        kept = firsts[: max(1, round(self.firsts * len(firsts)))]
        longer = [word for item in kept for word in words[item.trigger_ids[0]] if len(word) > 1]
        # A word's contrast is in units of the median of words of as many tokens, so that lengths can be compared.
        found = sorted((item for ids in by_length(longer) for item in contrasted(ids)), key=lambda item: item.loss)
        best = [item.trigger_ids for item in found[: self.ranked]]
        ranked = [item for ids in by_length(best) for item in rank_triggers(probe, objective, ids, budget=hunt.budget)]
        hunt.try_all(sorted(ranked, key=lambda item: item.loss)[: self.tried])
        hunt.settle(self.settles)


def _by_first_token(problem: Problem, count: int) -> dict[int, list[tuple[int, ...]]]:
    """Token ids of the dictionary's words by their first token, the commonest first; those that may stand there."""
    words: defaultdict[int, list[tuple[int, ...]]] = defaultdict(list)
    first, allowed = problem.permitted(2)
    for ids in problem.encode_all(dictionary()[:count]):
        if ids and first[ids[0]] and all(allowed[ids[1:]]):
            words[ids[0]].append(tuple(ids))
    return dict(words)
