"""Which runs a suite has: organisms x attacks x seeds, and what each run may spend.

K0 finds out first what there is to search for, so a run of it may spend more than one of K1.
"""

import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from attacks.attack import CORE
from attacks.scoring.budget import Budget
from benchmarks.organisms import zoo
from benchmarks.organisms.pretrained.fetch import PACKAGED
from benchmarks.variants import STUDIED


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """A grid of runs: every attack on every organism, with every seed and knowledge setting."""

    organisms: tuple[str, ...]
    attacks: tuple[str, ...]
    seeds: tuple[int, ...]
    budgets: dict[str, str]
    """per run, by knowledge setting: seconds (20s) or floating-point operations (2e12)"""
    models: Path | None = None
    """folder with further organisms"""
    held_out: int | None = None
    """held-out prompts that rates are measured on, evenly spaced; None: all of them"""
    dtype: str = "auto"
    """of the weights: float32, bfloat16, or auto, which is float32 on a CPU and the faster one on a GPU"""

    def budget(self, job: "Job") -> str:
        """What a run may spend."""
        return self.budgets[job.knowledge]


KNOWLEDGE = ("K0", "K1", "K2", "KB")
"""What an attack may know; every run has one."""
WITH_BASE, UNTOLD = ("K2", "KB"), ("K0", "KB")
"""Of these, those in which the clean base is known, and those in which the behaviour is not."""


class Job(NamedTuple):
    """One run."""

    organism: str
    attack: str
    knowledge: str
    """K0: model and clean prompts; K1: also the behaviour; K2: also the clean base; KB: the base, not the behaviour"""
    seed: int


REAL = (
    "portfolio",
    "target-nll",
    "delta-cosine-half",
    "delta-cosine-three",
    "delta-cosine-last",
    "hybrid",
    "steered-kl",
    "token-ranking",
    "leakage",
    "nanogcg",
)
"""What is compared in pretrained bases: the recommended attack, one of each sort of target, and the floor"""

SUITES = {
    "quick": Suite(organisms=zoo.NAMES, attacks=tuple(CORE), seeds=(0,), budgets={"K1": "4e11", "K0": "8e11"}),
    "standard": Suite(
        organisms=zoo.NAMES, attacks=tuple(STUDIED), seeds=(0, 1, 2), budgets={"K1": "120s", "K0": "180s"}
    ),
    # A completion of all held-out prompts of a model of 135M parameters takes longer than it tells: 80 are enough for
    # an interval of .05 to each side of .95.
    "real": Suite(
        organisms=zoo.present(None),
        attacks=REAL,
        seeds=(0, 1),
        budgets={"K1": "3e13", "K0": "6e13", "K2": "3e13", "KB": "3e13"},
        held_out=80,
    ),
}


def jobs(suite: Suite) -> list[Job]:
    """Every run; attacks change slowest, so that a table of all organisms is there early.

    A base is not compared with itself: whatever works on it would be passed over.
    """
    settings = [
        (s, k, a, o) for s in suite.seeds for k in suite.budgets for a in suite.attacks for o in suite.organisms
    ]
    return [Job(o, a, k, s) for s, k, a, o in settings if k not in WITH_BASE or o not in PACKAGED]


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
    models: Path | None = None,
) -> Suite:
    """A suite by name, parts of it replaced; without the attack `nanogcg` if its package is missing and none are named.

    Raises:
        ValueError: an unknown suite, organism or attack, an attack whose package is missing, an unreadable budget, or a
            folder of models without any card.
    """
    if name not in SUITES:
        raise ValueError(f"no suite {name!r}; there are {', '.join(SUITES)}")
    suite = SUITES[name]
    if models is not None and not any(models.glob("*/card.json")):
        raise ValueError(f"--models {models} holds no folder with a card.json; give where models were planted (--out)")
    if name == "real":
        suite = replace(suite, organisms=zoo.present(models))
    for setting in knowledge or ():
        # quick and standard have none with a base: what it adds is compared at the budget of another setting.
        if setting not in suite.budgets and not (budget and setting in KNOWLEDGE):
            raise ValueError(f"suite {name} has no budget for {setting!r}; give {', '.join(KNOWLEDGE)}, and --budget")
    # Left out in silence only where the suite chose it; whoever names it is told that its package is missing.
    missing = set() if nanogcg_installed() else {"nanogcg"}
    if missing & set(attacks or ()):
        raise ValueError("attack nanogcg needs the package nanogcg; install the extra: pip install -e '.[peer]'")
    chosen = Suite(
        organisms=organisms or suite.organisms,
        attacks=attacks or tuple(name for name in suite.attacks if name not in missing),
        seeds=suite.seeds if seeds is None else seeds,
        budgets={setting: budget or suite.budgets[setting] for setting in knowledge or suite.budgets},
        models=models,
        held_out=suite.held_out,
    )
    for organism in chosen.organisms:
        zoo.check_name(organism, models)
    for attack in chosen.attacks:
        if attack not in STUDIED:
            raise ValueError(f"no attack {attack!r}; there are {', '.join(STUDIED)}")
    for limit in chosen.budgets.values():
        parse_budget(limit)
    return chosen
