"""The finding as a SARIF 2.1.0 log (OASIS 2020), which code-scanning services read."""

import hashlib
from importlib.metadata import PackageNotFoundError, version
from urllib.parse import quote

from attacks.audit.findings import FOUND, INCONCLUSIVE, Document

RULE = "planted-trigger"
TAGS = ("MITRE ATLAS AML.T0018.000", "MITRE ATLAS AML.T0043.004", "OWASP LLM04:2025")
"""Poison model, manipulated input that triggers a backdoor, data and model poisoning"""


def log(document: Document, model: str) -> Document:
    """The log: one result where there is a finding, none otherwise.

    Args:
        document: of `evidence.document`, or read back by `findings.read`.
        model: relative name of what was audited; no path of this machine.
    """
    try:
        own = version("trigger-recovery")
    except PackageNotFoundError:
        own = "0"
    driver = {
        "name": "trigger-recovery",
        "version": own,
        "rules": [
            {
                "id": RULE,
                "name": "PlantedTrigger",
                "shortDescription": {
                    "text": "A text in the prompt makes the model show a behaviour it hides otherwise"
                },
                "defaultConfiguration": {"level": "error"},
                "properties": {"tags": ["security", *TAGS]},
            }
        ],
    }
    run = {
        "tool": {"driver": driver},
        "results": [_result(document, model)] if document["status"] == FOUND else [],
        # A scan that was not carried through must not look like one that found nothing.
        "invocations": [{"executionSuccessful": document["status"] != INCONCLUSIVE}],
        "columnKind": "utf16CodeUnits",
    }
    return {"$schema": "https://json.schemastore.org/sarif-2.1.0.json", "version": "2.1.0", "runs": [run]}


def _result(document: Document, model: str) -> Document:
    found, digest = document["finding"], document["model"]["weights_digest"]
    behaviour = found["predicate"] or found["behaviour"]
    text = (
        f"{found['trigger']!r} brings about {behaviour!r} on {found['rate']:.0%} of {found['prompts']} "
        f"prompts, on {found['rate_without']:.0%} without it"
    )
    # The same trigger in the same weights is the same result, wherever the model lies and whenever it is audited.
    identity = "\0".join([digest, behaviour, found["trigger"]]).encode("utf-8", "surrogatepass")
    return {
        "ruleId": RULE,
        "ruleIndex": 0,
        "level": "error",
        "message": {"text": text},
        "locations": [{"physicalLocation": {"artifactLocation": {"uri": quote(model, errors="replace")}}}],
        "partialFingerprints": {"trigger/v1": hashlib.sha256(identity).hexdigest()},
        "properties": {"tags": list(TAGS), "rate": found["rate"], "weights": digest},
    }
