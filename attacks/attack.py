"""The attacks by name: what is known, what is minimised, which stages search."""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

from attacks.discovery.goals import Supervised, Unsupervised
from attacks.objectives.delta_cosine import DeltaCosine
from attacks.objectives.delta_projection import DeltaProjection
from attacks.objectives.hybrid import Hybrid
from attacks.objectives.probe import Probe
from attacks.objectives.steered_kl import SteeredKL
from attacks.objectives.target_nll import TargetNLL
from attacks.searchers.accretion import Accretion
from attacks.searchers.arca import ARCA
from attacks.searchers.beast import BEAST
from attacks.searchers.gbda import GBDA
from attacks.searchers.gcg import GCG
from attacks.searchers.hotflip import HotFlip
from attacks.searchers.pez import PEZ
from attacks.searchers.random_search import RandomSearch
from attacks.stages.conjunctions import Conjunctions
from attacks.stages.fluent_text import Likely
from attacks.stages.hunt import Build, Dictionary, Peer, Rounds, Samples, Searcher, Stage, Tokens
from attacks.stages.sampling.leakage import Leakage
from attacks.stages.sampling.sampler import Lookahead, Sampler
from attacks.stages.word_substitution import Neighbours


def gcg(steps: int) -> GCG:
    """GCG as every attack uses it."""
    return GCG(steps=steps, search_width=128, topk=128, patience=15)


GCG_ROUNDS = Rounds(rounds=((3, gcg(8)), (12, gcg(60)), (8, gcg(40))))
"""A short slot can hit the trigger itself; a long one finds a way round hard negatives that leave no signal on the
trigger's parts"""
HOTFLIP_ROUNDS = Rounds(rounds=((3, HotFlip(steps=4)), (12, HotFlip(steps=24)), (8, HotFlip(steps=16))))
"""The same lengths"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attack:
    """A recipe."""

    knowledge: Literal["K0", "K1"]
    """K0: clean prompts only; K1: also the behaviour"""
    objective: Build
    supervised: Supervised | None = None
    """learns the vector where the objective needs one: in K1, and in K0 if no learned one carries over"""
    carries: float = 0.75
    """share of held-out prompts on which a K0 vector must call its behaviour to be imitated as it is; above 1: never"""
    unsupervised: Unsupervised = field(default_factory=Unsupervised)
    """learns behaviours in K0"""
    stages: tuple[Stage, ...] = (Tokens(), GCG_ROUNDS)
    """one after the other, until the budget is spent or a trigger is good enough"""
    last: Stage | None = None
    """looks at the winner, if there is budget left"""
    longest: int = 12
    """tokens of the longest trigger in any stage: every prompt must leave room for so many in the context"""
    prompts: int = 2
    """search prompts that the loss is averaged over"""
    vector_share: float = 0.35
    """share of the budget for learning behaviours in K0"""
    enough: float = 1.0
    """success rate on the `select` prompts that ends the search; the winner of many does less well on others"""


nll = TargetNLL.from_goal
cosine = DeltaCosine.from_goal
kl = SteeredKL.from_goal
projection = DeltaProjection.from_goal
probe = Probe.from_goal
mellowmax = partial(TargetNLL.from_goal, reduction="mellowmax")
hybrid = Hybrid.from_goal
with_projection = partial(Hybrid.from_goal, b=DeltaProjection.from_goal)


def _searched(*rounds: tuple[int, Searcher]) -> Attack:
    """Target NLL with another searcher in place of GCG."""
    return Attack(knowledge="K1", objective=nll, stages=(Tokens(), Rounds(rounds=rounds)))


def _sampled(sampler: Sampler | Leakage, weight: float = 1.0) -> Attack:
    """Target NLL on n-grams of samples."""
    return Attack(knowledge="K1", objective=nll, stages=(Samples(sampler=sampler, behaviour_weight=weight),))


PORTFOLIO: tuple[Stage, ...] = (
    Tokens(share=0.08),
    Dictionary(share=0.1, tried=16),
    Likely(),
    Rounds(rounds=((2, gcg(30)), (3, gcg(20))), share=0.08, times=4, settles=2),
    Samples(sampler=Leakage(), share=0.03, whole=0.05, settles=2),
    replace(HOTFLIP_ROUNDS, share=0.04, settles=2),
    Conjunctions(),
    replace(HOTFLIP_ROUNDS, sure=True),
)
"""What a trigger most likely is comes first: a token, a word, ordinary text of its place, two or three tokens, what the
model writes by itself where the prompts were learned too. Then, quickly, whatever works; and three words that fire only
together (where the budget has room), of which what works may be a mere neighbour; what is left goes into better ones"""

CORE: dict[str, Attack] = {
    "portfolio": Attack(knowledge="K1", objective=nll, stages=PORTFOLIO, last=Neighbours()),
    "target-nll": Attack(knowledge="K1", objective=nll),
    "delta-cosine": Attack(knowledge="K1", objective=cosine, supervised=Supervised()),
    "hybrid": Attack(knowledge="K1", objective=hybrid, supervised=Supervised()),
    "unsupervised-nll": Attack(knowledge="K0", objective=nll),
    "unsupervised-cosine": Attack(knowledge="K0", objective=cosine, supervised=Supervised()),
    "unsupervised-portfolio": Attack(knowledge="K0", objective=nll, stages=PORTFOLIO, last=Neighbours()),
    "nanogcg": Attack(knowledge="K1", objective=nll, stages=(Peer(),)),
}
"""The quick suite: the recommended attack, the main targets, and the peer"""

SEARCHERS: dict[str, Attack] = {
    "token-ranking": Attack(knowledge="K1", objective=nll, stages=(Tokens(share=1.0),)),
    "dictionary": Attack(knowledge="K1", objective=nll, stages=(Tokens(), Dictionary(share=1.0))),
    "random-search": _searched((3, RandomSearch(steps=4)), (12, RandomSearch(steps=16, mutate=2))),
    "accretion": _searched((3, Accretion(steps=6)), (12, Accretion(steps=24)), (8, Accretion(steps=16))),
    "hotflip": Attack(knowledge="K1", objective=nll, stages=(Tokens(), HOTFLIP_ROUNDS)),
    "likely": Attack(knowledge="K1", objective=nll, stages=(Tokens(), Likely(share=1.0))),
    "conjunctions": Attack(
        knowledge="K1", objective=nll, stages=(Tokens(), Conjunctions(share=1.0)), last=Neighbours()
    ),
    "beast": _searched((3, BEAST(steps=6)), (12, BEAST(steps=36)), (8, BEAST(steps=24))),
    "arca": _searched((3, ARCA(iterations=2)), (12, ARCA(iterations=6)), (8, ARCA(iterations=4))),
    "pez": _searched((3, PEZ(steps=100, restarts=8)), (12, PEZ(steps=300, restarts=8))),
    "gbda": _searched((3, GBDA(steps=30)), (12, GBDA(steps=100)), (8, GBDA(steps=100))),
    "leakage": _sampled(Leakage()),
    "sampler": _sampled(Sampler(count=2048)),
    "sampler-clean-only": _sampled(Sampler(count=2048), weight=0.0),
    "sampler-look-ahead": _sampled(Sampler(count=1024, lookahead=Lookahead())),
}
"""Target NLL by every other searcher"""

VARIANTS: dict[str, Attack] = {
    f"delta-cosine-{name}": Attack(knowledge="K1", objective=partial(cosine, depths=depths), supervised=Supervised())
    for name, depths in {"half": (0.5,), "last": (1.0,), "three": (0.5, 0.75, 1.0)}.items()
}
VARIANTS |= {
    f"hybrid-{weight}": Attack(knowledge="K1", objective=partial(hybrid, weight=weight), supervised=Supervised())
    for weight in (0.1, 0.25, 0.75, 0.9)
}
VARIANTS |= {
    name: Attack(knowledge="K1", objective=objective, supervised=Supervised())
    for name, objective in (("projection", projection), ("probe", probe), ("hybrid-projection", with_projection))
}
VARIANTS |= {
    f"hotflip-{name}": Attack(
        knowledge="K1", objective=objective, supervised=Supervised(), stages=(Tokens(), HOTFLIP_ROUNDS)
    )
    for name, objective in (
        ("delta-cosine", cosine),
        ("steered-kl", kl),
        ("projection", projection),
        ("hybrid", hybrid),
        ("hybrid-0.25", partial(hybrid, weight=0.25)),
    )
}
VARIANTS |= {
    f"hotflip-k0-cosine-{name}": Attack(
        knowledge="K0", objective=cosine, supervised=supervised, carries=2.0, stages=(Tokens(), HOTFLIP_ROUNDS)
    )
    for name, supervised in (("unsupervised", None), ("supervised", Supervised()))
}
VARIANTS["steered-kl"] = Attack(knowledge="K1", objective=kl, supervised=Supervised())
VARIANTS["unsupervised-kl"] = Attack(knowledge="K0", objective=kl, supervised=Supervised())
VARIANTS["mellowmax"] = Attack(knowledge="K1", objective=mellowmax)
"""Layers of the delta cosine, weights of the hybrid, further objectives, the targets by HotFlip; in K0, the vector that
found a behaviour against one learned for it"""

ATTACKS: dict[str, Attack] = CORE | SEARCHERS | VARIANTS
