"""What an audit found, as one document: the finding with its evidence, what was audited, how, and at what cost.

The document is `findings.json`; the page and the SARIF log are made from it and from nothing else.
"""

import hashlib
import json
import math
import platform
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from attacks.audit.findings import FOUND, INCONCLUSIVE, NONE, SCHEMA, VECTORS, Document, finite
from attacks.behaviour import completions, wilson
from attacks.judging.recovery import Recovery
from attacks.judging.verdict import ABSENT, NOISE, WORKS
from attacks.scoring.problem import Problem
from attacks.suspect import Suspect
from vectors.loading.placement import format_of
from vectors.models import weights_digest
from vectors.operations import count_of

SHOWN = 5
"""Prompts whose completions are shown side by side"""
NEW_TOKENS = 32
"""Tokens of these completions"""
PACKAGES = ("trigger-recovery", "torch", "transformers", "peft")


def document(suspect: Suspect, found: Recovery, select: Sequence[str], settings: Document, name: str) -> Document:
    """Everything that is known after an audit.

    Args:
        suspect: the model under audit.
        found: what the attack returned.
        select: the clean messages on which the winner was chosen and measured.
        settings: what the user asked for, by the names of the options; no paths, which would tell of the machine.
        name: of what was audited; the last part of its path.
    """
    status = FOUND if found.verdict == "functional" else INCONCLUSIVE if found.inconclusive else NONE
    return {
        "schema": SCHEMA,
        "status": status,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": {"name": name} | described(suspect),
        "settings": settings,
        "finding": finding(suspect, found, select) if found.trigger_ids else None,
        "interrupted": found.interrupted,
        "not_reached": list(found.not_reached),
        "no_room": list(found.no_room),
        "cost": {
            "seconds": found.seconds,
            "operations": found.flops,
            "gradients": found.steps,
            # Stages that the budget had no room for return at once.
            "by_stage": [cost._asdict() for cost in found.by_stage if cost.operations],
        },
        "environment": environment(suspect),
    }


def described(suspect: Suspect) -> Document:
    """What was audited, so that it can be told from every other model, tokenizer and template."""
    model, tokenizer = suspect.model, suspect.tokenizer
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        whole = backend.to_str()  # merges and normalisation too: they decide what a text becomes
    else:
        whole = json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]), ensure_ascii=False)
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    return {
        "class": type(model).__name__,
        "parameters": sum(map(count_of, model.parameters())),
        "weights_digest": weights_digest(model),
        "base_digest": None if suspect.base is None else weights_digest(suspect.base),
        "tokenizer_digest": _digest(whole),
        "template_digest": _digest(template),
        # A template is a program that sees every message: a backdoor can hide there, so a reader must see it.
        "template": template,
    }


def finding(suspect: Suspect, found: Recovery, select: Sequence[str]) -> Document:
    """The best trigger, whether it works or not, with all that speaks for and against it."""
    problem = Problem.from_chat(suspect.model, suspect.tokenizer, select, len(found.trigger_ids), slot=suspect.slot)
    low, high = wilson(found.select_asr, len(select))
    return {
        "verdict": found.verdict,
        "behaviour": found.behaviour,
        "predicate": found.predicate or None,
        "trigger": found.trigger,
        "trigger_ids": list(found.trigger_ids),
        # A user types text: only ids that the text encodes to again are what the model will see.
        "reencodes": problem.encode(problem.text(found.trigger_ids)) == list(found.trigger_ids),
        "rendered": suspect.tokenizer.decode(problem.filled(found.trigger_ids)[0]),
        "rate": found.select_asr,
        "rate_interval": [round(low, 4), round(high, 4)],
        "prompts": len(select),
        "rate_without": found.clean_rate,
        "rate_random": found.control_rate,
        "rate_on_base": found.base_rate,
        "necessary": list(found.necessary),
        "rate_without_token": list(found.without),
        "family": [finite(relative._asdict()) for relative in found.family],
        "tokens": [problem.text([token]) for token in found.trigger_ids],
        "vector": finite(found.vector),  # of a model that overflows
        "trace": [
            point._asdict()
            | {"trigger": problem.text(point.trigger_ids), "loss": point.loss if math.isfinite(point.loss) else None}
            for point in found.trace
        ],
        "examples": examples(suspect, found, problem, select),
        "calibration": calibration(found),
    }


def calibration(found: Recovery) -> list[Document]:
    """The limits by which the verdict was reached, and where each comes from: fixed ones, and those of this suspect."""
    fixed = "python -m benchmarks.studies.thresholds, over recorded runs on planted and clean models"
    rows: list[tuple[str, float, str]] = [
        ("success rate of a finding, at least", WORKS, fixed),
        ("rate without the trigger, and on the clean base, at most", ABSENT, fixed),
        ("mean rate of random tokens instead, at most", NOISE, fixed),
    ]
    radius = found.vector.get("radius")
    if isinstance(radius, float) and math.isfinite(radius):
        rows.append(("norm of the steering vector", radius, "set from the norms of this model's residuals"))
    if found.family and (strength := found.family[0].strength) < 1:
        source = "bisection on this model: where a trigger that works does so on half of the prompts"
        rows.append(("strength of the backdoor at which texts are compared", strength, source))
    return [{"what": what, "value": value, "source": source} for what, value, source in rows]


def examples(suspect: Suspect, found: Recovery, problem: Problem, select: Sequence[str]) -> list[Document]:
    """A few prompts with the model's completions: without the trigger, with it, with it on the clean base, and steered.

    Steered they are completed without the trigger, by the vector that the search imitated, where it did so.
    """
    some = problem.take(range(min(SHOWN, len(problem))))

    def written(model: Any, ids: Sequence[int]) -> list[str]:
        return completions(model, suspect.tokenizer, some, ids, max_new_tokens=NEW_TOKENS)

    without, triggered = written(suspect.model, ()), written(suspect.model, found.trigger_ids)
    clean = steered = [None] * len(without)
    if suspect.base is not None:
        clean = written(suspect.base, found.trigger_ids)
    if found.vectors is not None:
        with found.vectors[:1].apply(suspect.model):
            steered = written(suspect.model, ())
    names = ("prompt", "without", "triggered", "triggered_on_base", "steered")
    rows = zip(select, without, triggered, clean, steered, strict=False)  # only the first few prompts are shown
    return [dict(zip(names, row, strict=True)) for row in rows]


def environment(suspect: Suspect) -> Document:
    """What the numbers may depend on besides the settings; nothing that tells of the user or the machine's files."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # run from a checkout that was not installed
            versions[package] = None
    device = suspect.model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "python": platform.python_version(),
        "packages": versions,
        "device": f"{device.type} {name}",
        "dtype": format_of(suspect.model),
    }


def save_vectors(found: Recovery, folder: Path) -> None:
    """Writes the steering vector that the search imitated; one of an earlier audit of the folder goes.

    What cannot be written is said and left out, for the findings must not be lost with it.
    """
    file = folder / VECTORS
    try:
        if found.vectors is None:
            file.unlink(missing_ok=True)
        else:
            found.vectors.save(file)
    except (OSError, SafetensorError) as error:
        print(f"error: {file} cannot be written: {error}", file=sys.stderr)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
