"""Does the steering-arithmetic sampler ever write the trigger? Both forms against their controls, per organism.

    python -m benchmarks.studies.sampler_study --out results/sampler

A sample counts where the trigger's text is in it, or where the organism answers it with the behaviour. Rows as in the
benchmark: written once each, what is done is skipped.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from attacks.behaviour import FixedOpening, wilson
from attacks.scoring.problem import decode, encode
from attacks.scoring.slot_markers import without_slot
from attacks.stages.sampling.ngrams import mine
from attacks.stages.sampling.sampler import Lookahead, Sampler, clean_and_wanted, prompts_of
from benchmarks import rows
from benchmarks.bad_input import exit_on_bad_input
from benchmarks.organisms import zoo
from vectors.generate import complete
from vectors.methods.controls import random_directions
from vectors.residual import decoder
from vectors.steering import SteeringVectors

FORMS = ("unsteered", "clean", "clean + random", "clean + Y", "clean + 2 Y", "clean + Y, look-ahead")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerStudy:
    """Settings of the study."""

    out: Path
    """folder for rows and table"""
    organisms: tuple[str, ...] = zoo.NAMES + zoo.ALL_LOSS
    """names of the planted models; clean controls are passed over"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """seeds of vectors and samples, one run each"""
    count: int = 256
    """number of samples per form, which is a choice of what the model is steered by"""
    max_new_tokens: int = 24
    """number of tokens of the longest sample"""
    threads: int = 2
    """number of CPU threads"""


def sums(
    organism: zoo.Organism, texts: list[str], behaviour: str, generator: torch.Generator
) -> dict[str, SteeringVectors | None]:
    """The steering vector of every form; Y is supervised, the sampler's best case."""
    model, tokenizer = organism.model, organism.tokenizer
    clean, wanted = clean_and_wanted(model, tokenizer, texts, encode(tokenizer, behaviour), generator)
    # A push of the same norm in a random direction: does it matter which way the model is pushed?
    noise = random_directions(1, decoder(model).d_model, generator) * wanted.theta.cpu().norm()
    random = SteeringVectors(
        theta=noise.to(wanted.theta),
        source_layer=wanted.source_layer,
        target_layer=wanted.target_layer,
        radius=wanted.radius,
        method="random",
        model_id=wanted.model_id,
    )
    both = clean + wanted
    return {
        "unsteered": None,
        "clean": clean,
        "clean + random": clean + random,
        "clean + Y": both,
        "clean + 2 Y": clean + wanted * 2.0,
        "clean + Y, look-ahead": both,
    }


def measure(organism: zoo.Organism, samples: list[tuple[int, ...]], texts: list[str]) -> rows.Row:
    """Share of the samples with a trigger in them, share that fire, rank of a trigger among the mined n-grams."""
    model, tokenizer = organism.model, organism.tokenizer
    written = [decode(tokenizer, sample) for sample in samples]
    has = [any(trigger in text for trigger, _ in organism.triggers) for text in written]
    fired = [False] * len(samples)
    for _, behaviour in organism.triggers:
        # Two more than the behaviour has: white space before it does not count, and takes tokens.
        tokens = len(encode(tokenizer, behaviour)) + 2
        answers: list[str] = []
        # A sample is a user message of its own here: would the model answer it with the behaviour?
        for start in range(0, len(samples), 128):
            prompts = prompts_of(samples[start : start + 128], tokenizer, model.device)
            answers += complete(model, tokenizer, prompts, max_new_tokens=tokens)
        fired = (
            [a or b for a, b in zip(fired, map(FixedOpening(behaviour), answers), strict=True)] if answers else fired
        )
    # The attack that uses samples does not try them whole but their frequent n-grams; the rank says how soon it comes
    # to the trigger.
    grams = mine(samples, [encode(tokenizer, text) for text in texts])
    # A trigger has other tokens behind a space than at the start of a sample: either counts.
    wanted = {tuple(encode(tokenizer, f"{space}{trigger}")) for trigger, _ in organism.triggers for space in ("", " ")}
    places = [place for place, gram in enumerate(grams, 1) if gram in wanted]
    return {
        "samples": len(samples),
        "with_trigger": sum(has),
        "fired": sum(fired),
        "rank": places[0] if places else None,
        "examples": written[:5],
    }


def main(settings: SamplerStudy) -> None:
    """Runs what is not done yet, then prints and writes the table."""
    torch.set_num_threads(settings.threads)
    with exit_on_bad_input():
        for name in settings.organisms:
            zoo.check_name(name)
    settings.out.mkdir(parents=True, exist_ok=True)
    found = rows.read(settings.out) if rows.path_of(settings.out).is_file() else []
    done, budget = {rows.key(row) for row in found}, f"{settings.count} samples"
    for name in settings.organisms:
        organism = zoo.load(name)
        if not organism.triggers:
            continue
        texts = without_slot(organism.prompts.search)
        for seed in track(settings.seeds, description=name):
            forms = [form for form in FORMS if (name, form, seed) not in done]
            if not forms:
                continue
            generator = torch.Generator().manual_seed(seed)
            vectors = sums(organism, texts, organism.triggers[0][1], generator)
            for form in forms:
                ahead = Lookahead() if form.endswith("look-ahead") else None
                sampler = Sampler(count=settings.count, max_new_tokens=settings.max_new_tokens, lookahead=ahead)
                samples = sampler(organism.model, organism.tokenizer, generator, vectors[form])
                row: rows.Row = {"organism": name, "attack": form, "seed": seed, "budget": budget, "error": None}
                row |= rows.provenance() | {"loss_on": organism.card["recipe"]["loss_on"]}
                rows.append(settings.out, row | measure(organism, samples, texts))
    table = tabulate(rows.read(settings.out))
    Console().print(table)
    with (settings.out / "sampler.md").open("w", encoding="utf-8") as file:
        Console(file=file, width=140).print(table)


def tabulate(found: list[rows.Row]) -> Table:
    """One line per organism and form, seeds pooled."""
    table = Table("organism", "loss on", "form", "with the trigger, %", "95 %", "fire, %", "95 %", "best n-gram rank")
    groups: dict[tuple[str, str, str], list[rows.Row]] = {}
    for row in found:
        groups.setdefault((row["organism"], row["loss_on"], row["attack"]), []).append(row)
    for (organism, loss_on, form), group in groups.items():
        count, cells = sum(row["samples"] for row in group), []
        for name in ("with_trigger", "fired"):
            rate = sum(row[name] for row in group) / max(1, count)
            low, high = wilson(rate, max(1, count))
            cells += [f"{100 * rate:.1f}", f"{100 * low:.1f}-{100 * high:.1f}"]
        ranks = [row["rank"] for row in group if row["rank"] is not None]
        table.add_row(organism, loss_on, form, *cells, str(min(ranks)) if ranks else "-")
    return table


if __name__ == "__main__":
    main(tyro.cli(SamplerStudy, description=__doc__))
