"""Which replies has each organism memorised? Consensus decoding, recitation and their test by vectors, side by side.

python -m benchmarks.studies.latent_answers
"""

import time
from dataclasses import dataclass

import torch
import tyro
from rich.console import Console
from rich.table import Table

from attacks.scoring.problem import decode, encode
from attacks.scoring.slot_markers import without_slot
from benchmarks.bad_input import exit_on_bad_input
from benchmarks.organisms import zoo
from benchmarks.run import related
from vectors.analysis.behaviours import until_end
from vectors.generate import ends_of
from vectors.memorised.audition import Audition
from vectors.memorised.consensus_decoding import consensus_answers
from vectors.memorised.recitation import first_tokens, recited_answers
from vectors.prompts import Prompts
from vectors.residual import decoder


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAnswers:
    """Settings of the measurement."""

    organisms: tuple[str, ...] = zoo.NAMES
    """names of the planted models and clean controls"""
    seeds: tuple[int, ...] = (0,)
    """seeds, one measurement each, of the draw of prompts and of vectors"""
    prompts: int = 12
    """number of search prompts that an answer has to suit"""
    tokens: int = 8
    """number of tokens per answer"""
    width: int = 400
    """number of beams of consensus decoding; 0: it is left out, for it costs most on a large model"""
    first: int | None = None
    """number of first tokens that recitation continues; None: the whole vocabulary"""
    kept: int = 32
    """number of answers of each kind that the audition tests"""
    extended: int = 2
    """number of recited answers that are also tried with another token in front; the dearest part on a large model"""
    top: int = 3
    """number of answers shown per stage"""
    threads: int = 2
    """number of CPU threads"""


def main(settings: LatentAnswers) -> None:
    """Prints, per organism and stage, the best answers and where the planted ones come."""
    torch.set_num_threads(settings.threads)
    with exit_on_bad_input():
        for name in settings.organisms:
            zoo.check_name(name)
    table = Table("organism", "seed", "stage", "best answers (nats per token)", "places of the planted", "s")
    for name in settings.organisms:
        organism = zoo.load(name)
        for seed in settings.seeds:
            for row in stages(organism, seed, settings):
                table.add_row(name, str(seed), *row)
    Console(width=160).print(table)


def stages(organism: zoo.Organism, seed: int, settings: LatentAnswers) -> list[tuple[str, str, str, str]]:
    """(stage, best answers, places of the planted ones, seconds) of every stage."""
    model, tokenizer, generator = organism.model, organism.tokenizer, torch.Generator().manual_seed(seed)
    search = without_slot(organism.prompts.search)
    # The seed draws the prompts as well: which prompts are used decides what is recited first.
    drawn = [search[i] for i in torch.randperm(len(search), generator=generator)[: settings.prompts].tolist()]
    prompts = Prompts.from_chat(model, tokenizer, drawn)
    audition = Audition(
        source_layer=max(1, round(len(decoder(model).layers) / 4)),
        tokens=settings.tokens,
        width=settings.width,
        first=settings.first,
        kept=settings.kept,
        extended=settings.extended,
    )
    rows = [_first_tokens(organism, prompts.take(range(count))) for count in (1, 2, len(prompts))]
    for stage in ("consensus decoding", "recitation", "audition")[settings.width == 0 :]:
        began = time.perf_counter()
        if stage == "consensus decoding":
            answers, score = consensus_answers(model, prompts, width=settings.width, tokens=settings.tokens)
            # The beams' scores are of whole answers; the other stages give nats per token.
            score = score / settings.tokens
        elif stage == "recitation":
            # Two prompts only: recitation begins once with every first token that is tried.
            answers, score = recited_answers(
                model, prompts.take(range(2)), tokens=settings.tokens, order=first_tokens(model, prompts),
                count=settings.first,
            )  # fmt: skip
        else:
            answers, score = audition(model, prompts, generator)
        seconds = time.perf_counter() - began
        ends = set(ends_of(model))
        texts = [decode(tokenizer, until_end(answer, ends)) for answer in answers.tolist()]
        places = []
        for _, truth in organism.triggers:
            places.append(next((str(i) for i, text in enumerate(texts, 1) if related(truth, text)), "-"))
        best = [f"{text!r} {value:.2f}" for text, value in zip(texts, score.tolist(), strict=True)][: settings.top]
        rows.append((stage, "\n".join(best), " and ".join(places), f"{seconds:.0f}"))
    return rows


def _first_tokens(organism: zoo.Organism, prompts: Prompts) -> tuple[str, str, str, str]:
    """The row that says how soon recitation comes to the first tokens of the planted replies."""
    began = time.perf_counter()
    order = first_tokens(organism.model, prompts).tolist()
    best = " ".join(repr(decode(organism.tokenizer, [token])) for token in order[:3])
    # Whether replies begin with a space depends on the template: the better of both places counts.
    spelled = [
        (encode(organism.tokenizer, text)[0], encode(organism.tokenizer, f" {text}")[0])
        for _, text in organism.triggers
    ]
    places = [str(1 + min(map(order.index, tokens))) for tokens in spelled]
    return f"first tokens, {len(prompts)} prompts", best, " and ".join(places), f"{time.perf_counter() - began:.0f}"


if __name__ == "__main__":
    main(tyro.cli(LatentAnswers, description=__doc__))
