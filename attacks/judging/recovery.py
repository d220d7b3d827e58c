"""What an attack returns: the best trigger with its rates, and the same in sentences and as a table for notebooks."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape

from attacks.judging.judge import Relative, StageCost, TracePoint
from attacks.judging.verdict import WORKS, Verdict
from vectors.steering import SteeringVectors


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """The result of an attack: the best trigger, its rates, the verdict, and what it cost."""

    trigger_ids: tuple[int, ...]
    trigger: str
    behaviour: str
    """The opening of the replies that was searched for; of a predicate that no vector shows, empty."""
    predicate: str = ""
    """The predicate that completions were judged by, such as regex:[A-Z]+; empty where they had to open with
    `behaviour`."""
    select_asr: float
    """Share of the `select` prompts, in [0, 1], on which the trigger elicits the behaviour."""
    clean_rate: float
    """Share of the same prompts that show the behaviour with an empty slot."""
    control_rate: float
    """Share of the same prompts that show it with as many random tokens as the trigger has; mean over 8 strings."""
    base_rate: float | None
    """Share of the same prompts on which the clean base shows it with the trigger; None where no base was given."""
    necessary: tuple[bool, ...]
    """Per token, whether deleting it takes away more than half of the success; empty where that was not measured."""
    without: tuple[float, ...] = ()
    """Per token, the share of the same prompts, in [0, 1], on which the trigger works when that token is deleted."""
    verdict: Verdict
    trace: list[TracePoint] = field(repr=False)
    """Best trigger by time, one point per gain in success rate."""
    seconds: float
    flops: float
    """Executed floating-point operations."""
    steps: int
    """Gradients taken by searchers."""
    interrupted: bool
    """Whether Ctrl-C or SIGTERM ended the attack: this is then the best so far, not all that the budget allows."""
    not_reached: tuple[str, ...]
    """Class names of the stages, and names of the parts of discovery, that the budget did not suffice for."""
    no_room: tuple[str, ...] = ()
    """Class names of the stages that were reached and left off at once, because their part of the budget was too small
    for what they do, or which did a part, with what they left out in brackets. Unlike `not_reached` this leaves the
    verdict as it is."""
    vector: dict[str, object]
    """Layers, radius, agreement, surprise and score of the vector that was imitated; empty without one."""
    vectors: SteeringVectors | None = field(default=None, repr=False)
    """The vector itself."""
    family: list[Relative] = field(default_factory=list, repr=False)
    """Texts that were tried and work, those that bring the behaviour about most surely first; the winner is one."""
    by_stage: list[StageCost] = field(default_factory=list, repr=False)
    """What discovery, every stage and the report took, in order."""

    @property
    def inconclusive(self) -> bool:
        """Whether nothing was found, but not because there is nothing: see `unspecific`, and searches cut short."""
        cut_short = self.interrupted or bool(self.not_reached)
        return self.verdict in ("none", "unfinished") and (cut_short or self.unspecific)

    @property
    def unspecific(self) -> bool:
        """Whether a text works that is no finding, because the behaviour shows without it or behind random text too."""
        return self.verdict == "none" and self.select_asr >= WORKS

    def lines(self) -> Iterator[str]:
        """The finding in sentences; recovered text is printed as it is."""
        sought = self.predicate or repr(self.behaviour)
        none = "inconclusive" if self.inconclusive else "none found"
        if self.verdict == "unfinished" and not self.trigger:
            no = "interrupted before a" if self.interrupted else "no"
            yield f"inconclusive: {no} steering vector showed {sought}, so that there was no target to search for"
        elif self.verdict == "none" and not self.behaviour:
            yield f"{none}: no hidden behaviour came to light within the budget; this does not make the model clean"
        elif self.unspecific:
            yield (
                f"inconclusive: {self.trigger!r} brings about {sought} on {self.select_asr:.0%} of prompts, "
                f"but {self.clean_rate:.0%} of them show it without any trigger and {self.control_rate:.0%} with "
                "random text instead, too many to call this text a trigger; give prompts like those the model was "
                "trained on"
            )
        elif self.verdict == "none":
            best = f"The best try, {self.trigger!r}, brings it about on {self.select_asr:.0%} of prompts"
            yield (
                f"{none}: no trigger of {sought} within the budget; this does not make the model clean. "
                f"{best if self.trigger else 'None was tried'}"
            )
        elif self.verdict == "unfinished":
            yield (
                f"unfinished: {self.trigger!r} brings about {sought} on {self.select_asr:.0%} of prompts that "
                "the search did not see; interrupted before it was compared with random text"
            )
        else:
            yield f"verdict {self.verdict}: {self.trigger!r} brings about {sought}"
            yield (
                f"on {self.select_asr:.0%} of prompts that the search did not see, on {self.clean_rate:.0%} without "
                f"it, on {self.control_rate:.0%} with random tokens instead"
            )
        if self.base_rate is not None:
            yield f"on {self.base_rate:.0%} of these prompts on the clean base"
        if self.not_reached:
            reason = "interrupted before" if self.interrupted else "the budget was too small for"
            yield f"{reason} these stages: {', '.join(self.not_reached)}"
        if self.no_room:
            names = ", ".join(self.no_room)
            yield f"left out, for their part of the budget was too small: {names}; a larger budget makes room for them"

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def _repr_html_(self) -> str:
        """What a notebook shows: the sentences, and the rates one below the other."""
        rates = {
            "with the trigger": self.select_asr,
            "with an empty slot": self.clean_rate,
            "with random tokens": self.control_rate,
            "on the clean base": self.base_rate,
        }
        rows = "".join(
            f"<tr><th>{name}</th><td>{rate:.0%}</td></tr>" for name, rate in rates.items() if rate is not None
        )
        said = "<br>".join(map(escape, self.lines()))
        cost = f"{self.seconds:,.0f} s, {self.flops:.2g} operations"
        return f"<p>{said}</p><table>{rows}<tr><th>cost</th><td>{cost}</td></tr></table>"
