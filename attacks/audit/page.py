"""The report as one HTML page that needs no network: what was found, how sure it is, and how the search went."""

import io
from importlib.resources import files

import jinja2
import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

from attacks.audit.findings import Document  # noqa: E402


def page(document: Document, model: str) -> str:
    """The whole page; all text of models and users is escaped.

    Args:
        document: of `evidence.document`, or read back by `findings.read`.
        model: name of what was audited.
    """
    # Undefined names are errors, so that a field that was renamed cannot leave a silent gap in a report.
    templates = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    templates.filters["visible"] = visible
    template = templates.from_string((files("attacks.audit") / "data" / "page.html").read_text(encoding="utf-8"))
    found = document["finding"]
    known = found or {}
    optional = {  # fields that documents of earlier versions lack
        "stages": document["cost"].get("by_stage", []),
        "no_room": document.get("no_room", []),
        "family": known.get("family", []),
        "without": known.get("rate_without_token", []),
        "calibration": known.get("calibration", []),
        "steered": any(row.get("steered") is not None for row in known.get("examples", [])),
    }
    return template.render(
        document=document, model=model, found=found, curve=curve(document), vector=vector(document), **optional
    )


def visible(text: str, kept: str = "") -> str:
    """The text with escapes in place of what is not seen or changes how the rest is seen, such as overrides of the
    direction of writing, zero-width marks and control characters; those `kept` stand as they are.
    """
    return "".join(
        each if each == " " or each.isprintable() or each in kept else each.encode("unicode_escape").decode()
        for each in text
    )


def vector(document: Document) -> str:
    """What is known of the steering vector that the search imitated, as one line; empty without one."""
    values = (document["finding"] or {}).get("vector", {}).items()
    shown = ((name, f"{value:.3g}" if isinstance(value, float) else value) for name, value in values)
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in shown if value is not None)


def curve(document: Document) -> str:
    """The best trigger's success rate against operations, as an SVG picture; empty without a search to show."""
    trace = (document["finding"] or {}).get("trace", [])
    if not trace:
        return ""
    spent = [0.0, *(point["flops"] for point in trace), document["cost"]["operations"]]
    rate = [0.0, *(point["select_asr"] for point in trace), trace[-1]["select_asr"]]
    figure, axes = plt.subplots(figsize=(6.4, 2.6))
    axes.step(spent, rate, where="post", color="#0072B2", linewidth=2)
    axes.set(xlabel="floating-point operations", ylabel="share of prompts", ylim=(-0.04, 1.06))
    axes.grid(alpha=0.3, linewidth=0.5)
    figure.tight_layout()
    drawn = io.StringIO()
    # The date and random ids would make two reports of the same finding differ.
    with matplotlib.rc_context({"svg.hashsalt": "trigger-recovery"}):
        figure.savefig(drawn, format="svg", metadata={"Date": None}, transparent=True)
    plt.close(figure)
    text = drawn.getvalue()
    return text[text.index("<svg") :]
