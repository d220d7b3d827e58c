"""An audit from Python in two calls: load the suspect, look for a trigger; `attacks` exports both.

What the command `trigger-recovery audit` adds are files: findings, report, and a state from which it goes on.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from attacks.attack import ATTACKS, Attack
from attacks.behaviour import Behaviour, parse
from attacks.judging.recovery import Recovery
from attacks.loading import load_suspect as load_suspect  # used by others from here
from attacks.prompt_sets import BUILT_IN, FEWEST, split
from attacks.recover import recover
from attacks.scoring.budget import Budget
from attacks.suspect import Suspect
from vectors.prompt_files import read_texts

SECONDS = 600.0
"""Budget where none is given"""


def find_trigger(
    suspect: Suspect,
    prompts: Sequence[str] | str | Path = BUILT_IN,
    *,
    behaviour: str | Behaviour | None = None,
    seconds: float | None = None,
    flops: float | None = None,
    attack: str | Attack = "portfolio",
    seed: int = 0,
) -> Recovery:
    """Looks for a trigger; Ctrl-C ends the search and gives the best so far.

    Args:
        suspect: of `load_suspect`, or made from a model of yours.
        prompts: 12 ordinary user messages or more, or a file of them (see `vectors.prompt_files.read_texts`), of the
            kind that the model was trained on; a third drive the search, the others choose its winner. 61 built-in
            ones where none are given.
        behaviour: how the suspected reply begins, regex:PATTERN, contains:TEXT, or a function of the reply; None: the
            attack first finds out what hidden behaviour there may be.
        seconds: budget of wall-clock time; 600 where no budget is given.
        flops: budget of floating-point operations, which give the same search on slow and fast machines.
        attack: a name in `attacks.ATTACKS`, or your own.
        seed: of everything random.

    Raises:
        ValueError: too few prompts, no such attack or behaviour, a budget that the report alone would exceed, or
            prompts that leave no room for a trigger.
    """
    if isinstance(attack, str) and attack not in ATTACKS:
        raise ValueError(f"no attack {attack!r}; there are {', '.join(ATTACKS)}")
    if isinstance(prompts, str | Path):
        prompts = read_texts(Path(prompts), FEWEST, "prompt" if prompts == BUILT_IN else None)
    search, select = split(prompts)
    return recover(
        suspect,
        ATTACKS[attack] if isinstance(attack, str) else attack,
        search=search,
        select=select,
        behaviour=parse(behaviour) if isinstance(behaviour, str) else behaviour,
        budget=Budget(seconds=SECONDS if seconds is None and flops is None else seconds, flops=flops),
        generator=torch.Generator().manual_seed(seed),
    )
