"""Is a planted word told from its relatives where only a part of what it leaves in the residual stream is left?

    python -m benchmarks.studies.early_layers.dimmed word

Words that share a token with the planted one mostly fire as well, each with certainty. Where the clean base is known
they are told apart on a suspect whose backdoor is weakened (`benchmarks.studies.clean_base.handicap`). Here the base is
not used: the residual stream x at the tokens in the slot is replaced by s x + (1 - s) m after a few blocks, m its mean
over random words of as many tokens in the same place. It says at which place the planted word comes among its relatives
by the nats of the whole behaviour, for each layer and each strength s; at strength 1 the suspect is as it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch
import tyro
from torch import Tensor

from attacks.objectives.target_nll import TargetNLL
from attacks.scoring.budget import Budget
from attacks.scoring.engine import Engine
from attacks.searchers.token_ranking import by_length
from attacks.searchers.words import encoded_words, is_word
from attacks.stages.hunt import PROBE_TOKENS
from attacks.stages.words.dictionary import rank_texts
from attacks.suspect import Suspect
from benchmarks.bad_input import exit_on_bad_input
from benchmarks.studies.clean_base.handicap import relatives
from benchmarks.studies.clean_base.planted import with_base
from vectors.residual import changed, check_layer

RANDOM = 64
"""Random words that means are taken over"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Ranks a planted word among its relatives with its residual stream dimmed."""

    organism: tyro.conf.Positional[str]
    """Organism planted with one word of the dictionary."""
    models: Path | None = None
    """Folder with planted models; the shipped organisms where none is given."""
    layers: tuple[int, ...] = (1, 2, 4)
    """After how many blocks the residual stream is mixed."""
    strengths: tuple[float, ...] = (0.8, 0.7, 0.6, 0.5)
    """Parts of it that are left."""
    relatives: int = 30
    """Words that share a token with the planted one: those of lowest loss."""
    prompts: int = 8
    """Prompts that nats are averaged over, with the slot at random places."""
    seed: int = 0
    """Seed of the random words."""
    threads: int = 2
    """CPU threads."""


def dimmed_nats(
    engine: Engine, words: Sequence[tuple[int, ...]], target_ids: Sequence[int], layer: int, strength: float, seed: int
) -> list[float]:
    """Nats of the behaviour behind each word, mean over prompts, with so much of its residual stream left.

    Args:
        engine: runs the suspect.
        words: token ids.
        target_ids: the behaviour.
        layer: after how many blocks the residual stream is mixed.
        strength: the part of it that is left, in [0, 1].
        seed: of the random words that the rest is the mean of.
    """
    found, drawn = dict[tuple[int, ...], float](), torch.Generator().manual_seed(seed)
    every = [tuple(ids) for ids in encoded_words(engine.problem).values()]
    target, objective = list(target_ids), TargetNLL(target_ids=tuple(target_ids))
    for ids in by_length(words):
        alike = [other for other in every if len(other) == ids.shape[1]]
        random = torch.tensor([alike[number] for number in torch.randperm(len(alike), generator=drawn)[:RANDOM]])
        losses = torch.zeros(len(ids))
        for number in range(len(engine.problem)):
            one = Engine(engine.model, engine.problem.take([number]))
            one.caches = False  # so that no two texts share what they begin with
            # Without a cache every forward pass begins with the prompt.
            start = 0 if engine.caches else len(one.problem.before[0])
            place, means = slice(start, start + ids.shape[1]), list[Tensor]()

            def keep(hidden: Tensor, place: slice = place, means: list[Tensor] = means) -> Tensor:
                means.append(hidden[:, place].mean(0))
                return hidden

            with changed(engine.model, layer, keep), torch.no_grad():
                one.target_logprobs(random, target)

            def mix(hidden: Tensor, place: slice = place, mean: Tensor = means[0]) -> Tensor:
                mixed = hidden.clone()
                mixed[:, place] = strength * hidden[:, place] + (1 - strength) * mean
                return mixed

            with changed(engine.model, layer, mix):
                losses += one.losses(objective, ids).cpu()
        nats = losses / len(engine.problem) * len(target)
        found |= zip(map(tuple, ids.tolist()), nats.tolist(), strict=True)
    return [found[tuple(word)] for word in words]


def ranked(suspect: Suspect, texts: Sequence[str], trigger: str, behaviour: str, settings: Settings) -> pd.DataFrame:
    """Place of the planted word among its relatives, its nats, and those of the best: by layer and strength.

    Raises:
        ValueError: the trigger is no word of the dictionary, or a layer that the model does not have.
    """
    if not is_word(trigger):
        raise ValueError(f"the trigger is {trigger!r}, which is no word of the dictionary; give another organism")
    for layer in settings.layers:
        check_layer(suspect.model, layer)
    target, like = suspect.target_ids(behaviour, texts), suspect.engine(texts, 1)
    engine = suspect.engine_of_random_places(texts, like) or like
    rough = rank_texts(
        suspect.engine(texts[:1], 1), TargetNLL(target_ids=tuple(target[:PROBE_TOKENS])),
        relatives(engine.problem, trigger), budget=Budget(),
    )  # fmt: skip
    best = [tuple(item.trigger_ids) for item in rough[: settings.relatives]]
    # Longer words that begin with the planted one are told from it by what naming them takes.
    typed = {ids: engine.problem.text(ids).strip() for ids in best}
    own = tuple(engine.problem.encode(trigger))
    rivals = [own, *(ids for ids in best if not typed[ids].startswith(trigger))]
    rows = list[dict[str, object]]()
    for layer, strength in [(settings.layers[0], 1.0), *((a, b) for a in settings.layers for b in settings.strengths)]:
        nats = dimmed_nats(engine, rivals, target, layer, strength, settings.seed)
        least = min(range(len(nats)), key=nats.__getitem__)
        rows.append(
            {
                "layer": layer, "strength": strength, "place": sum(other < nats[0] for other in nats) + 1,
                "of": len(nats), "planted": nats[0], "best": nats[least],
                "which": engine.problem.text(rivals[least]).strip(),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def main(settings: Settings) -> None:
    """Prints the table."""
    torch.set_num_threads(settings.threads)
    with exit_on_bad_input():
        organism, suspect = with_base(settings.organism, settings.models)
        suspect = replace(suspect, base=None)
        texts = organism.prompts.search[: settings.prompts]
        table = ranked(suspect, texts, *organism.triggers[0], settings)
    print(table.to_markdown(index=False, floatfmt=".3f"))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
