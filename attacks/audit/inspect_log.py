"""The findings document as a log of Inspect (UK AI Security Institute, package inspect_ai), for `inspect view`.

Needs the extra `inspect`. Every prompt whose completions the document shows is one sample per condition: without the
trigger, with it, and with it on the clean base where that is known. A sample's score says whether the completion shows
the behaviour. The rates over all prompts, of which the samples are the first few, are metrics of the log.
"""

import os
from pathlib import Path
from typing import Any

from inspect_ai.log import (  # pyright: ignore[reportMissingImports]
    EvalConfig,
    EvalDataset,
    EvalLog,
    EvalMetric,
    EvalResults,
    EvalSample,
    EvalScore,
    EvalSpec,
    write_eval_log,
)
from inspect_ai.model import ModelOutput  # pyright: ignore[reportMissingImports]
from inspect_ai.scorer import CORRECT, INCORRECT, Score  # pyright: ignore[reportMissingImports]

from attacks.audit.evidence import Document
from attacks.behaviour import Behaviour, FixedOpening, parse

CONDITIONS = ("without", "triggered", "triggered_on_base")
RATES = ("rate", "rate_without", "rate_random", "rate_on_base")
SCORER = "shows_behaviour"


def eval_log(document: Document, model: str) -> EvalLog:
    """The log: a sample per prompt and condition, one score with the rates as metrics, the rest as metadata.

    Args:
        document: of `evidence.document`.
        model: relative name of what was audited; no path of this machine.
    """
    found: dict[str, Any] = document["finding"] or {}
    samples = [
        _sample(document, model, number, condition)
        for number, example in enumerate(found.get("examples", ()))
        for condition in CONDITIONS
        if example[condition] is not None
    ]
    rates = {name: found[name] for name in RATES if found.get(name) is not None}
    metrics = {name: EvalMetric(name=name, value=value) for name, value in rates.items()}
    score = EvalScore(name=SCORER, scorer=SCORER, scored_samples=found.get("prompts"), metrics=metrics)
    packages = {name: number for name, number in document["environment"]["packages"].items() if number is not None}
    return EvalLog(
        status="cancelled" if document["interrupted"] else "success",
        eval=EvalSpec(
            created=document["created"],
            task="trigger-recovery audit",
            task_args=document["settings"],
            model=model,
            dataset=EvalDataset(name="clean prompts", samples=found.get("prompts")),
            config=EvalConfig(),
            packages=packages,
            # What no field of Inspect is for; the document itself has more.
            metadata={name: document[name] for name in ("status", "model", "cost", "environment", "not_reached")}
            | {name: found[name] for name in ("verdict", "behaviour", "predicate", "trigger", "trigger_ids") if found},
        ),
        results=EvalResults(
            total_samples=len(samples), completed_samples=len(samples), scores=[score] if rates else []
        ),
        samples=samples,
    )


def write(path: Path, document: Document, model: str) -> None:
    """Writes the log to a file that ends in .eval or .json, in one move, so that no reader ever finds half of it."""
    part = path.with_name(f"part-{path.name}")
    write_eval_log(eval_log(document, model), part)
    os.replace(part, path)


def _sample(document: Document, model: str, number: int, condition: str) -> EvalSample:
    found = document["finding"]
    example, behaviour = found["examples"][number], _behaviour(found)
    completion = example[condition]
    shown = None if behaviour is None else behaviour(completion)
    score = Score(value=CORRECT if shown else INCORRECT, answer=completion)
    return EvalSample(
        id=f"{number + 1}-{condition}",
        epoch=1,
        input=example["prompt"],
        target=found["predicate"] or found["behaviour"],
        output=ModelOutput.from_content(model, completion),
        scores={} if shown is None else {SCORER: score},
        metadata={"condition": condition, "trigger": "" if condition == "without" else found["trigger"]},
    )


def _behaviour(found: Document) -> Behaviour | None:
    """What completions are judged by; None for a predicate that is a function, which reading a file must not import."""
    if found["predicate"] is None:
        return FixedOpening(found["behaviour"]) if found["behaviour"].strip() else None
    return parse(found["predicate"]) if found["predicate"].startswith(("regex:", "contains:")) else None
