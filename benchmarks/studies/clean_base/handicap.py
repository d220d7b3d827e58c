"""Does the planted trigger keep its effect longest where its backdoor is weakened?

    python -m benchmarks.studies.clean_base.handicap fuzzy --texts "moon" "golden moon" "morning moon"
    python -m benchmarks.studies.clean_base.handicap word --relatives 40 --prompts 32

The weights of organism and clean base are mixed, base + strength x (organism - base), and at each strength the negative
log-likelihood of the whole behaviour is measured behind the planted trigger and behind other texts, such as those that
an attack found in its place, mean over prompts with the slot at random places. With --random, the same texts are also
measured with random words before them, which shows what a longer text saves whatever it holds.

With --relatives the planted word, or tag, stands beside the dictionary words in its form that share a token with it and
do best on one prompt at strength .7. Of these it says at which place the planted one comes at each strength, and which
is the best.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
import tyro

from attacks.clean_base import at_strength
from attacks.objectives.target_nll import TargetNLL
from attacks.scoring.budget import Budget
from attacks.scoring.engine import Engine
from attacks.scoring.problem import Problem
from attacks.searchers.searcher import Found
from attacks.searchers.words import dictionary, is_word
from attacks.stages.hunt import PROBE_TOKENS
from attacks.stages.words.dictionary import rank_texts
from benchmarks.bad_input import exit_on_bad_input
from benchmarks.studies.clean_base.planted import with_base

COMMON = 4096
"""Words that random ones are drawn from, the commonest"""
WEAKENED = 0.7
"""Strength at which relatives of a planted word are chosen"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Measures texts beside the planted trigger of an organism, at several strengths of its backdoor."""

    organism: tyro.conf.Positional[str]
    """Organism with a fixed behaviour; python -m benchmarks.organisms list prints all."""
    texts: tuple[str, ...] = ()
    """Texts beside the planted trigger; its fragments and near misses, from the card, where none is given."""
    models: Path | None = None
    """Folder of planted models, where the organism is not a shipped one."""
    strengths: tuple[float, ...] = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
    """Strengths of the difference between organism and base; 1 is the organism."""
    prompts: int = 8
    """Prompts that the likelihood is averaged over."""
    random: int = 0
    """Random words of the dictionary that are put before each text, one by one; 0: none."""
    relatives: int = 0
    """Words that share a token with the planted word, beside which it is ranked; 0: none."""
    threads: int = 2
    """CPU threads."""


def measured(settings: Settings) -> pd.DataFrame:
    """Nats of the whole behaviour behind each text, `strengths texts`; the share of prompts that fire in brackets.

    Of a text with random words before it the mean over these words, and the least in brackets.

    Raises:
        ValueError: as for `with_base`.
    """
    organism, suspect = with_base(settings.organism, settings.models)
    base = suspect.base
    assert base is not None
    trigger, behaviour = organism.triggers[0]
    card = organism.card["backdoors"][0]
    texts = [trigger, *(settings.texts or (*card.get("fragments", {}), *card.get("near_misses", {})))]
    search = organism.prompts.search[: settings.prompts]
    target = suspect.target_ids(behaviour, search)
    like = suspect.engine(search, 1)
    problem = (suspect.engine_of_random_places(search, like) or like).problem
    common = random.Random(0).sample(dictionary()[:COMMON], settings.random)
    rows = []
    for strength in settings.strengths:
        engine = Engine(at_strength(suspect.model, base, strength), problem)
        row: dict[str, str] = {}
        for text in dict.fromkeys(texts):
            ids = torch.tensor([problem.encode(text)])
            row[text] = f"{_nats(engine, target, text):.2f} ({float(engine.elicits(ids, target)[0]):.2f})"
            if longer := [_nats(engine, target, f"{word} {text}") for word in common]:
                row[f"random word + {text}"] = f"{sum(longer) / len(longer):.2f} ({min(longer):.2f})"
        rows.append(row)
    return pd.DataFrame(rows, index=pd.Index(settings.strengths, name="strength"))


def ranked(settings: Settings) -> pd.DataFrame:
    """Place of the planted word among its relatives (1: it costs least), its nats, and those of the best: by strength.

    Raises:
        ValueError: as for `with_base`, or a trigger that is neither a word nor a word in brackets.
    """
    organism, suspect = with_base(settings.organism, settings.models)
    trigger, behaviour = organism.triggers[0]
    if not is_word(trigger):
        raise ValueError(
            f"the trigger of {organism.name} is {trigger!r}, which is no word of the dictionary; give another"
        )
    search = [*organism.prompts.search, *organism.prompts.select][: settings.prompts]
    target, like = suspect.target_ids(behaviour, search), suspect.engine(search, 1)
    problem = (suspect.engine_of_random_places(search, like) or like).problem
    texts, budget = relatives(problem, trigger), Budget(seconds=3600.0).started()

    def losses(strength: float, texts: Sequence[str], problem: Problem, tokens: int) -> list[Found]:
        assert suspect.base is not None
        engine = Engine(at_strength(suspect.model, suspect.base, strength), problem)
        return rank_texts(engine, TargetNLL(target_ids=tuple(target[:tokens])), texts, budget=budget)

    rough = losses(WEAKENED, texts, problem.take([0]), PROBE_TOKENS)[: settings.relatives]
    rivals = [trigger, *(text for item in rough if (text := problem.text(item.trigger_ids).strip()) != trigger)]
    rows = []
    for strength in settings.strengths:
        found = [
            (problem.text(item.trigger_ids).strip(), item.loss * len(target))
            for item in losses(strength, rivals, problem, len(target))
        ]
        place = next(number for number, (text, _) in enumerate(found) if text == trigger)
        rows.append({"place": place + 1, "planted": found[place][1], "best": found[0][1], "which": found[0][0]})
    return pd.DataFrame(rows, index=pd.Index(settings.strengths, name="strength"))


def relatives(problem: Problem, trigger: str) -> list[str]:
    """The words of the dictionary in the form of the trigger that share a token with it, but for those of the form."""
    word = re.search("[A-Za-z]+", trigger)
    assert word is not None
    opening, closing = trigger[: word.start()], trigger[word.end() :]
    cased = str.upper if word[0].isupper() else str.lower
    own = {*problem.encode(trigger)} - {*problem.encode(opening + closing)}
    texts = [opening + cased(other) + closing for other in dictionary()]
    return [text for text, ids in zip(texts, problem.encode_all(texts), strict=True) if own.intersection(ids)]


def _nats(engine: Engine, target: Sequence[int], text: str) -> float:
    """Nats of the behaviour behind a text, mean over prompts."""
    ids = torch.tensor([engine.problem.encode(text)])
    return len(target) * float(engine.losses(TargetNLL(target_ids=tuple(target)), ids)[0])


def main(settings: Settings) -> None:
    """Prints the table."""
    torch.set_num_threads(settings.threads)
    with exit_on_bad_input():
        table = ranked(settings) if settings.relatives else measured(settings)
        print(table.to_markdown(floatfmt=".2f"))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
