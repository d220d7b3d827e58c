"""Searches prompts for the trigger of a backdoored model. What a program needs is exported here:

    from attacks import find_trigger, load_suspect

Each name is imported when it is first used: torch and transformers take seconds, and the console must not wait for them
to print its help.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attacks.api import find_trigger as find_trigger
    from attacks.api import load_suspect as load_suspect
    from attacks.attack import ATTACKS as ATTACKS
    from attacks.attack import Attack as Attack
    from attacks.judging.recovery import Recovery as Recovery
    from attacks.scoring.budget import Budget as Budget
    from attacks.suspect import Suspect as Suspect

HOMES = {
    "find_trigger": "attacks.api",
    "load_suspect": "attacks.api",
    "ATTACKS": "attacks.attack",
    "Attack": "attacks.attack",
    "Recovery": "attacks.judging.recovery",
    "Budget": "attacks.scoring.budget",
    "Suspect": "attacks.suspect",
}
"""Module of each exported name"""


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'attacks' has no attribute {name!r}; it exports {', '.join(HOMES)}")
    return getattr(import_module(HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *HOMES]
