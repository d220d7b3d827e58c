"""An audit from Python in two calls: load the suspect, look for a trigger; `attacks` exports both.

What the command `trigger-recovery audit` adds are files: findings, report, and a state from which it goes on.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from attacks.attack import ATTACKS, Attack
from attacks.behaviour import Behaviour, parse
from attacks.clean_base import base_without_adapter, named_base
from attacks.judging.recovery import Recovery
from attacks.prompt_sets import BUILT_IN, FEWEST, split
from attacks.recover import recover
from attacks.scoring.budget import Budget
from attacks.scoring.slot_markers import Where
from attacks.suspect import Suspect
from vectors.models import load_model
from vectors.prompt_files import read_texts

SECONDS = 600.0
"""Budget where none is given"""


def load_suspect(
    model: str | Path,
    *,
    adapter: str | Path | None = None,
    base: str | Path | None = None,
    slot: Where = "end",
    **loading: Any,
) -> Suspect:
    """Loads the model under audit, and its clean base in whatever way it is known.

    Args:
        model: folder in the Hugging Face layout, a GGUF file, the folder of an adapter, or a hub id; no code in it is
            run.
        adapter: folder or hub id of a peft adapter that is merged into the model; the model without it then counts as
            the clean base.
        base: folder or hub id of the clean model that the suspect was trained from, if it is known.
        slot: where in a message a trigger is tried, unless the message marks the place by {trigger}.
        loading: further arguments of `vectors.models.load_model`, such as dtype and device.

    Raises:
        ValueError: one line that names what cannot be loaded and says what to do.
    """
    suspect, tokenizer = load_model(model, adapter=adapter, **loading)
    pickle = loading.get("allow_pickle", False)
    if base is not None:
        clean = named_base(str(base), suspect, tokenizer, allow_pickle=pickle)
    else:
        named = None if adapter is None else str(adapter)
        clean, _ = base_without_adapter(str(model), named, suspect, tokenizer, allow_pickle=pickle)
    return Suspect(model=suspect, tokenizer=tokenizer, slot=slot, base=clean)


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
