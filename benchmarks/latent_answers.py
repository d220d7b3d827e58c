"""What is each organism closest to saying on every prompt? Consensus decoding alone: no vector, no steering.

python -m benchmarks.latent_answers
"""

import sys
import time
from dataclasses import dataclass

import torch
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.organisms import zoo
from benchmarks.run import related
from benchmarks.vectors_study import clean
from vectors.consensus_decoding import consensus_answers
from vectors.prompts import Prompts


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAnswers:
    """Settings of the measurement."""

    organisms: tuple[str, ...] = zoo.NAMES
    """planted models and controls"""
    prompts: int = 12
    """search prompts that an answer has to suit, the first ones"""
    tokens: int = 8
    """length of the answers"""
    width: int = 400
    """beams"""
    top: int = 3
    """answers shown"""
    threads: int = 2
    """CPU threads"""


def main(settings: LatentAnswers) -> None:
    """Prints, per organism, the likeliest answers and where the planted one comes."""
    torch.set_num_threads(settings.threads)
    try:
        for name in settings.organisms:
            zoo.check_name(name)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    table = Table("organism", "answer", "nats", "planted", "place of the planted one", "s")
    for name in settings.organisms:
        organism = zoo.load(name)
        prompts = Prompts.from_chat(
            organism.model, organism.tokenizer, clean(organism.prompts.search[: settings.prompts])
        )
        began = time.perf_counter()
        answers, nats = consensus_answers(organism.model, prompts, width=settings.width, tokens=settings.tokens)
        seconds = time.perf_counter() - began
        texts = organism.tokenizer.batch_decode(answers, clean_up_tokenization_spaces=False)
        planted = [any(related(truth, text) for _, truth in organism.triggers) for text in texts]
        place = str(planted.index(True) + 1) if any(planted) else "-"
        for index in range(min(settings.top, len(texts))):
            last = (place, f"{seconds:.0f}") if index == 0 else ("", "")
            mark = "yes" if planted[index] else ""
            table.add_row(name if index == 0 else "", repr(texts[index]), f"{-nats[index]:.1f}", mark, *last)
    Console().print(table)


if __name__ == "__main__":
    main(tyro.cli(LatentAnswers, description=__doc__))
