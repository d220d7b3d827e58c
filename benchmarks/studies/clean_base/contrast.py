"""Where do planted triggers stand among other texts by their contrast between suspect and clean base?

    python -m benchmarks.studies.clean_base.contrast word other-word unseen-real-word

Texts are ranked by how differently early layers of the organism and of its base read them, with neither behaviour nor
trigger known (`attacks.discovery.contrasted_texts`). A first table shows, for each token of the trigger, the contrast
of the trigger up to it, and its rank among the same beginning with each of `--sample` random tokens. A second one shows
the rank of the trigger in a search from nothing, the texts of largest contrast, and the operations that it took; the
trigger has no rank where the search did not come by it.
"""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
import tyro

from attacks.discovery.comparison import Comparison
from attacks.discovery.contrasted_texts import ContrastedTexts
from attacks.scoring.budget import Budget
from attacks.scoring.problem import Problem
from attacks.scoring.slot_markers import without_slot
from attacks.searchers.candidates import random_triggers
from attacks.suspect import Suspect
from benchmarks.bad_input import exit_on_bad_input
from benchmarks.studies.clean_base.planted import with_base

SHOWN = 8
"""Texts of largest contrast that are shown"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Ranks planted triggers by contrast."""

    organisms: tyro.conf.Positional[tuple[str, ...]] = ("word", "other-word")
    """Planted organisms; python -m benchmarks.organisms list prints all."""
    models: Path | None = None
    """Folder of planted models, where the organisms are not shipped ones."""
    sample: int = 1000
    """Random tokens that each token of the trigger is compared with."""
    search: bool = True
    """Whether to search from nothing as well; --no-search takes the first table only, which is fast."""
    words: int = ContrastedTexts().words
    """Words of the dictionary that are ranked, the commonest first."""
    longest: int = ContrastedTexts().longest
    """Tokens of the longest text."""
    depths: tuple[float, ...] = ContrastedTexts().depths
    """Depths at which the models are compared, as fractions of the layers."""
    seed: int = 0
    """Seed of the random tokens and strings."""
    threads: int = 2
    """CPU threads."""


def by_token(name: str, suspect: Suspect, problem: Problem, trigger: str, settings: Settings) -> pd.DataFrame:
    """One line per token of the trigger."""
    compared = Comparison.at_slot(suspect, problem, settings.depths)
    generator, ids = torch.Generator().manual_seed(settings.seed), tuple(problem.encode(trigger))
    lines = []
    for length in range(1, len(ids) + 1):
        permitted = problem.permitted(length).cpu()
        others = random_triggers(permitted, ContrastedTexts().others, generator)
        tokens = random_triggers(permitted[-1:], settings.sample, generator)[:, 0].tolist()
        beside = list(dict.fromkeys((*ids[: length - 1], token) for token in (ids[length - 1], *tokens)))
        ranked = compared.ranked(beside, compared.contrast(others), Budget())
        contrasts = {item.trigger_ids: -item.loss for item in ranked}
        lines.append(
            {
                "organism": name,
                "trigger up to": problem.text(ids[:length]).strip(),
                "contrast": contrasts[ids[:length]],
                "largest other": max(value for text, value in contrasts.items() if text != ids[:length]),
                "rank": list(contrasts).index(ids[:length]) + 1,
                "of": len(contrasts),
            }
        )
    return pd.DataFrame(lines)


def searched(name: str, suspect: Suspect, problem: Problem, trigger: str, settings: Settings) -> pd.DataFrame:
    """One line: where the trigger stands among the texts of each kind that a search returns."""
    budget = Budget().started()
    contrast = ContrastedTexts(words=settings.words, longest=settings.longest, depths=settings.depths)
    kinds = contrast(suspect, problem, budget, torch.Generator().manual_seed(settings.seed))
    ids = tuple(problem.encode(trigger))
    line: dict[str, object] = {"organism": name, "trigger": trigger}
    for kind, ranked in zip(("known", "put together"), kinds, strict=True):
        texts = [item.trigger_ids for item in ranked]
        line[f"rank, {kind}"] = texts.index(ids) + 1 if ids in texts else None
        line[f"largest contrast, {kind}"] = ", ".join(problem.text(text).strip() for text in texts[:SHOWN])
    line["operations"] = f"{budget.used:.2e}"
    return pd.DataFrame([line])


def main(settings: Settings) -> None:
    """Prints the tables of each organism as soon as they are there."""
    torch.set_num_threads(settings.threads)
    for name in settings.organisms:
        with exit_on_bad_input():
            organism, suspect = with_base(name, settings.models)
            problem = suspect.engine(without_slot(organism.prompts.search)[:1], 2).problem
            trigger, _ = organism.triggers[0]
            for table in (by_token, searched) if settings.search else (by_token,):
                print(table(name, suspect, problem, trigger, settings).round(1).to_markdown(index=False), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
