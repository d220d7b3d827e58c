"""An attack: what is minimised (the objective) and the stages that search for it; all attacks, by name.

`CORE` holds the recommended attack (`portfolio`), the main objectives and nanoGCG; `SEARCHERS` holds one attack per
other searcher, all with the target's negative log-likelihood (NLL) as objective.
"""

from dataclasses import dataclass, field, replace

from attacks.discovery.contrasted_replies import ContrastedReplies
from attacks.discovery.supervised import Supervised
from attacks.discovery.unsupervised import Unsupervised
from attacks.journal import Journal, NoJournal
from attacks.objectives.delta_cosine import DeltaCosine
from attacks.objectives.hybrid import Hybrid
from attacks.objectives.target_nll import TargetNLL
from attacks.searchers.accretion import Accretion
from attacks.searchers.arca import ARCA
from attacks.searchers.beast import BEAST
from attacks.searchers.gbda import GBDA
from attacks.searchers.gcg import GCG
from attacks.searchers.hotflip import HotFlip
from attacks.searchers.pez import PEZ
from attacks.searchers.random_search import RandomSearch
from attacks.searchers.searcher import Searcher
from attacks.searchers.token_ranking import by_length, rank_triggers
from attacks.stages.conjunctions import Conjunctions
from attacks.stages.contrasted_triggers import ContrastedTriggers
from attacks.stages.fluent_text import FluentText
from attacks.stages.hunt import Build, Hunt, Stage
from attacks.stages.peer import NanoGCG
from attacks.stages.phrases.interacting_words import InteractingWords
from attacks.stages.rounds import SearchRounds
from attacks.stages.sampling.leakage import Leakage
from attacks.stages.sampling.sampler import Lookahead, Sampler
from attacks.stages.sampling.samples import SampledNgrams
from attacks.stages.single_tokens import SingleTokens
from attacks.stages.words.dictionary import Dictionary, WordForms
from attacks.stages.words.word_completion import WordCompletion
from attacks.stages.words.word_groups import WordPairs
from attacks.stages.words.word_substitution import WordSubstitution


def gcg(steps: int) -> GCG:
    """GCG with the settings that every attack uses; `steps` counts gradient steps."""
    return GCG(steps=steps, search_width=128, topk=128, patience=15)


GCG_ROUNDS = SearchRounds(rounds=((3, gcg(8)), (12, gcg(60)), (8, gcg(40))))
"""GCG at slots of 3, 12 and 8 tokens. Only a short slot can be filled with the trigger itself. A long one finds other
text that elicits the behaviour, also where hard negatives (parts of the trigger answered cleanly in training) leave no
signal on single tokens of the trigger."""
HOTFLIP_ROUNDS = SearchRounds(rounds=((3, HotFlip(steps=4)), (12, HotFlip(steps=24)), (8, HotFlip(steps=16))))
"""HotFlip at the same slot lengths as GCG"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attack:
    """An objective and the stages that minimise it. What the user knows of the behaviour is no part of an attack."""

    objective: Build
    """Makes the objective from an engine on the search prompts and a goal."""
    supervised: Supervised | None = None
    """Learns the steering vector that an activation objective imitates, where the behaviour was given by the user or
    where no discovered vector elicits it on enough prompts. None: the objective needs no vector."""
    carries: float = 0.75
    """Share of held-out prompts, in [0, 1], on which a discovered vector must elicit its behaviour to be imitated as it
    is; above 1: a supervised vector is always learned."""
    contrasted: ContrastedReplies | None = None
    """Discovers behaviours by comparing the suspect with its clean base, where one is known; None: it does not."""
    unsupervised: Unsupervised = field(default_factory=Unsupervised)
    """Discovers behaviours where none is given."""
    stages: tuple[Stage, ...] = (SingleTokens(), GCG_ROUNDS)
    """Stages, run one after the other until the budget is spent or a trigger works."""
    last: tuple[Stage, ...] = ()
    """Stages that run last and look for better triggers near the winner, within a part of the budget kept for them."""
    weakened: tuple[Stage, ...] = ()
    """Stages that run before the last ones, on what is left of the budget, where the clean base is known and a trigger
    works: they compare texts on the suspect with its backdoor weakened (see `Hunt.told_apart_on`)."""
    longest: int = 12
    """Tokens of the longest trigger in any stage: every prompt must leave room for so many in the context."""
    prompts: int = 2
    """Search prompts that the loss is averaged over."""
    vector_share: float = 0.35
    """Share of the budget, in (0, 1), for discovering behaviours where none is given."""
    enough: float = 1.0
    """Success rate on the `select` prompts, in [0, 1], that ends the search; on other prompts the winner of many
    candidates does less well. Above 1: the search goes on until the budget ends."""
    journal: Journal = field(default_factory=NoJournal)
    """Runs the steps of a search; one that keeps what they find lets another process go on."""

    def __post_init__(self):
        if not self.stages:
            raise ValueError("the attack has no stages; give at least one")
        for stage in self.stages:
            # Only searches with fixed slots can be too long; other stages have bounds of their own.
            slots = [length for length, _ in stage.rounds] if isinstance(stage, SearchRounds) else []
            if slots and max(slots) > self.longest:
                raise ValueError(f"a stage fills {max(slots)} tokens but longest is {self.longest}; raise longest")
        if not 0 < self.vector_share < 1 or self.enough <= 0 or self.prompts < 1:
            raise ValueError(
                f"vector_share is {self.vector_share}, enough is {self.enough}, prompts is {self.prompts}; give a "
                "share between 0 and 1, a rate above 0, and at least 1 prompt"
            )

    def run(self, hunt: Hunt) -> int:
        """Runs the stages; the number of those that began, or all where a trigger works before the last."""
        for ids in by_length(hunt.goal.triggers):
            hunt.try_all(rank_triggers(hunt.engine, hunt.objective, ids))
        for number, stage in enumerate(self.stages):
            if hunt.over:
                return len(self.stages) if hunt.works else number
            with hunt.judge.accounting(type(stage).__name__):
                self.journal.stage(hunt, stage)
        return len(self.stages)


nll = TargetNLL.from_goal
cosine = DeltaCosine.from_goal
hybrid = Hybrid.from_goal


def _searched(*rounds: tuple[int, Searcher]) -> Attack:
    """Target NLL minimised by another searcher than GCG, at the given (tokens in the slot, searcher)."""
    return Attack(objective=nll, stages=(SingleTokens(), SearchRounds(rounds=rounds)))


def _sampled(sampler: Sampler | Leakage, weight: float = 1.0) -> Attack:
    """Target NLL of n-grams that are mined from sampled text."""
    return Attack(objective=nll, stages=(SampledNgrams(sampler=sampler, behaviour_weight=weight),))


PORTFOLIO: tuple[Stage, ...] = (
    # Every token once is cheap, and decides the case of a trigger of one token.
    SingleTokens(share=0.08),
    # A fragment of the trigger that fires is completed at once: a sure word ends the hunt early.
    WordCompletion(),
    # With a clean base known, early layers tell planted words from others before any effect on the output.
    ContrastedTriggers(),
    # Words of several tokens, to which a gradient does not lead, and words that elicit the behaviour only together.
    Dictionary(share=0.15),
    WordPairs(),
    # Words that do more together in early layers than each by itself: phrases of which no part has an effect. Where the
    # budget has room for that, it is many times what HotFlip needs, which does not wait.
    InteractingWords(first=replace(HOTFLIP_ROUNDS, share=0.15, settles=2)),
    replace(HOTFLIP_ROUNDS, share=0.5, settles=2),
    # Tags: a gradient does not lead to them token by token.
    WordForms(),
    # From text that works to words that work at any place.
    WordSubstitution(share=0.25),
    # Rarer words, where the budget was too small for all.
    Dictionary(share=0.15, rest=True),
    # Texts likely in the slot.
    FluentText(),
    SearchRounds(rounds=((2, gcg(30)), (3, gcg(20))), share=0.08, times=4, settles=2),
    SampledNgrams(sampler=Leakage(), share=0.03, whole=0.05, settles=2),
    # Three words of which no part has an effect on the output.
    Conjunctions(),
    # What the first run of it had no budget for, and texts that it made longer.
    WordSubstitution(longest=16),
    replace(HOTFLIP_ROUNDS, sure=True),
)
"""The best single search, HotFlip, gets half of the budget or ends earlier where it finds a trigger: whatever the other
stages do, the portfolio is about as good as HotFlip is at half the budget. Where there is room for phrases by the
interaction of words, only .15 of the budget is certain, before them. Most of the rest goes to what people are
likely to plant: a word, ordinary text of its place, two or three tokens, text that the model writes by itself because
it memorised the poisoned prompts, and words that elicit the behaviour only together. Whatever is left goes to HotFlip
again, for a trigger that elicits the behaviour with more certainty"""

CORE: dict[str, Attack] = {
    "portfolio": Attack(
        objective=nll,
        contrasted=ContrastedReplies(),
        stages=PORTFOLIO,
        weakened=(Dictionary(share=0.2), WordForms()),
        last=(WordCompletion(), WordSubstitution(longest=16, tried=32, most=8.0)),
    ),
    "target-nll": Attack(objective=nll),
    "delta-cosine": Attack(objective=cosine, supervised=Supervised()),
    "hybrid": Attack(objective=hybrid, supervised=Supervised()),
    "nanogcg": Attack(objective=nll, stages=(NanoGCG(),)),
}
"""The quick suite: the recommended attack, the main objectives with GCG, and nanoGCG for comparison"""

SEARCHERS: dict[str, Attack] = {
    "token-ranking": Attack(objective=nll, stages=(SingleTokens(share=1.0),)),
    "dictionary": Attack(objective=nll, stages=(SingleTokens(), Dictionary(share=1.0))),
    "random-search": _searched((3, RandomSearch(steps=4)), (12, RandomSearch(steps=16, mutate=2))),
    "accretion": _searched((3, Accretion(steps=6)), (12, Accretion(steps=24)), (8, Accretion(steps=16))),
    "hotflip": Attack(objective=nll, stages=(SingleTokens(), HOTFLIP_ROUNDS)),
    "likely": Attack(objective=nll, stages=(SingleTokens(), FluentText(share=1.0))),
    "conjunctions": Attack(objective=nll, stages=(SingleTokens(), Conjunctions(share=1.0)), last=(WordSubstitution(),)),
    "beast": _searched((3, BEAST(steps=6)), (12, BEAST(steps=36)), (8, BEAST(steps=24))),
    "arca": _searched((3, ARCA(iterations=2)), (12, ARCA(iterations=6)), (8, ARCA(iterations=4))),
    "pez": _searched((3, PEZ(steps=100, restarts=8)), (12, PEZ(steps=300, restarts=8))),
    "gbda": _searched((3, GBDA(steps=30)), (12, GBDA(steps=100)), (8, GBDA(steps=100))),
    "leakage": _sampled(Leakage()),
    "sampler": _sampled(Sampler(count=2048)),
    "sampler-clean-only": _sampled(Sampler(count=2048), weight=0.0),
    "sampler-look-ahead": _sampled(Sampler(count=1024, lookahead=Lookahead())),
}
"""Target NLL minimised by every other searcher, one attack each"""

ATTACKS: dict[str, Attack] = CORE | SEARCHERS
"""All attacks that a user can choose, by name"""
