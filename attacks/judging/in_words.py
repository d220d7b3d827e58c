"""A finding, or that there is none, in lines that a person reads."""

from collections.abc import Iterator

from attacks.judging.report import Recovery


def describe(found: Recovery) -> Iterator[str]:
    """The finding in lines; recovered text is printed as it is."""
    sought = found.predicate or repr(found.behaviour)
    if found.verdict == "unfinished" and not found.trigger:
        no = "interrupted before a" if found.interrupted else "no"
        yield f"inconclusive: {no} steering vector showed {sought}, so that there was no target to search for"
    elif found.verdict == "none" and not found.behaviour:
        yield "none found: no hidden behaviour came to light within the budget; this does not make the model clean"
    elif found.unspecific:
        yield (
            f"inconclusive: {found.trigger!r} brings about {sought} on {found.select_asr:.0%} of prompts, "
            f"but {found.clean_rate:.0%} of them show it without any trigger and {found.control_rate:.0%} with random "
            "text instead, too many to call this text a trigger; give prompts like those the model was trained on"
        )
    elif found.verdict == "none":
        best = f"The best try, {found.trigger!r}, brings it about on {found.select_asr:.0%} of prompts"
        yield (
            f"none found: no trigger of {sought} within the budget; this does not make the model clean. "
            f"{best if found.trigger else 'None was tried'}"
        )
    elif found.verdict == "unfinished":
        yield (
            f"unfinished: {found.trigger!r} brings about {sought} on {found.select_asr:.0%} of prompts that "
            "the search did not see; interrupted before it was compared with random text"
        )
    else:
        yield f"verdict {found.verdict}: {found.trigger!r} brings about {sought}"
        yield (
            f"on {found.select_asr:.0%} of prompts that the search did not see, on {found.clean_rate:.0%} without it, "
            f"on {found.control_rate:.0%} with random tokens instead"
        )
    if found.base_rate is not None:
        yield f"on {found.base_rate:.0%} of these prompts on the clean base"
    if found.not_reached:
        reason = "interrupted before" if found.interrupted else "the budget was too small for"
        yield f"{reason} these stages: {', '.join(found.not_reached)}"
