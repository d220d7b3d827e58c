"""Which runs a suite has: organisms x attacks x seeds, and what each run may spend.

K0 finds out first what there is to search for, so a run of it may spend more than one of K1.
"""

import importlib.util
from dataclasses import dataclass
from typing import NamedTuple

from attacks.attack import CORE
from attacks.scoring.budget import Budget
from benchmarks.organisms import zoo
from benchmarks.variants import STUDIED


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """A grid of runs: every attack on every organism, with every seed and knowledge setting."""

    organisms: tuple[str, ...]
    attacks: tuple[str, ...]
    seeds: tuple[int, ...]
    budgets: dict[str, str]
    """per run, by knowledge setting: seconds (20s) or floating-point operations (2e12)"""

    def budget(self, job: "Job") -> str:
        """What a run may spend."""
        return self.budgets[job.knowledge]


class Job(NamedTuple):
    """One run."""

    organism: str
    attack: str
    knowledge: str
    """K0: model and clean prompts; K1: also the behaviour; K2: also the clean base"""
    seed: int


SUITES = {
    "quick": Suite(organisms=zoo.NAMES, attacks=tuple(CORE), seeds=(0,), budgets={"K1": "4e11", "K0": "8e11"}),
    "standard": Suite(
        organisms=zoo.NAMES, attacks=tuple(STUDIED), seeds=(0, 1, 2), budgets={"K1": "120s", "K0": "180s"}
    ),
}


def jobs(suite: Suite) -> list[Job]:
    """Every run; attacks change slowest, so that a table of all organisms is there early."""
    # Seeds change slowest of all: a grid that is cut off has whole seeds, not some organisms with three and others with
    # none.
    return [Job(o, a, k, s) for s in suite.seeds for k in suite.budgets for a in suite.attacks for o in suite.organisms]


def parse_budget(text: str) -> Budget:
    """`20s` is seconds, a plain number floating-point operations; raises ValueError for anything else."""
    try:
        return Budget(seconds=float(text[:-1])) if text.endswith("s") else Budget(flops=float(text))
    except ValueError as error:
        raise ValueError(f"budget is {text!r}; give seconds such as 20s, or FLOPs such as 2e12") from error


def nanogcg_installed() -> bool:
    """Whether the optional package of the attack `nanogcg` can be imported."""
    return importlib.util.find_spec("nanogcg") is not None


def choose(
    name: str,
    organisms: tuple[str, ...] | None,
    attacks: tuple[str, ...] | None,
    seeds: tuple[int, ...] | None,
    budget: str | None,
    knowledge: tuple[str, ...] | None = None,
) -> Suite:
    """A suite by name, parts of it replaced; without the attack `nanogcg` if its package is missing and none are named.

    Raises:
        ValueError: an unknown suite, organism or attack, an attack whose package is missing, or an unreadable budget.
    """
    if name not in SUITES:
        raise ValueError(f"no suite {name!r}; there are {', '.join(SUITES)}")
    suite = SUITES[name]
    for setting in knowledge or ():
        # K2 has no budget of its own in any suite: what the clean base adds is compared at the budget of another
        # setting.
        if setting not in suite.budgets and not (budget and setting in ("K0", "K1", "K2")):
            raise ValueError(f"suite {name} has no budget for {setting!r}; give K0, K1 or K2, and --budget")
    # Left out in silence only where the suite chose it; whoever names it is told that its package is missing.
    missing = set() if nanogcg_installed() else {"nanogcg"}
    if missing & set(attacks or ()):
        raise ValueError("attack nanogcg needs the package nanogcg; install the extra: pip install -e '.[peer]'")
    chosen = Suite(
        organisms=organisms or suite.organisms,
        attacks=attacks or tuple(name for name in suite.attacks if name not in missing),
        seeds=suite.seeds if seeds is None else seeds,
        budgets={setting: budget or suite.budgets[setting] for setting in knowledge or suite.budgets},
    )
    for organism in chosen.organisms:
        zoo.check_name(organism)
    for attack in chosen.attacks:
        if attack not in STUDIED:
            raise ValueError(f"no attack {attack!r}; there are {', '.join(STUDIED)}")
    for limit in chosen.budgets.values():
        parse_budget(limit)
    return chosen
