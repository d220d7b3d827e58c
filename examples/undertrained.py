"""A new stage in one file: tries the least trained tokens as triggers (Land & Bartolo 2024, arXiv:2405.05417).

Tokens that training hardly ever showed keep short input embeddings, and whoever plants a trigger may choose one of them
since no clean text holds it. (The paper reads input embeddings where they are not tied to the output; where they are
tied, a short row is a weaker sign.) To add a stage of your own, write a class like this one and a line like the last
one in a dict of `attacks/attack.py`.
"""

from dataclasses import dataclass

from attacks.attack import Attack
from attacks.objectives.target_nll import TargetNLL
from attacks.searchers.candidates import check_counts
from attacks.searchers.token_ranking import rank_triggers
from attacks.stages.hunt import Hunt
from vectors.residual import embedding


@dataclass(frozen=True, slots=True, kw_only=True)
class Undertrained:
    """The allowed tokens of shortest embedding, each by itself, ranked by their exact loss on one prompt."""

    count: int = 512
    """Tokens whose loss is computed."""
    tried: int = 8
    """Best of them that are judged by behaviour."""

    def __post_init__(self):
        check_counts(self, "count", "tried")

    def __call__(self, hunt: Hunt) -> None:
        allowed = hunt.engine.problem.permitted(1)[0].nonzero()[:, 0].cpu()
        norms = embedding(hunt.suspect.model).float().norm(dim=-1).cpu()  # vocab
        shortest = allowed[norms[allowed].argsort(stable=True)[: self.count]]
        # The norm only draws up the shortlist: which token elicits the behaviour is for the model to say.
        hunt.try_best(rank_triggers(*hunt.probe(), shortest[:, None], budget=hunt.budget), self.tried)


ATTACKS = {"undertrained": Attack(objective=TargetNLL.from_goal, stages=(Undertrained(),))}
