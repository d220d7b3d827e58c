"""Do parts of a trigger stand out when the suspect is steered towards the behaviour, or when its backdoor is weakened?

    python -m benchmarks.studies.assisted_ranks phrase unseen-phrase --out results/assisted-ranks

The parts of an organism's trigger (single words, pairs, one word missing) and random strings of as many words are
scored by the negative log-likelihood of the behaviour's first four tokens, mean over prompts. What is reported is the
share of the random strings that score better than the part: 0 is the best, .5 is chance. The model is scored as it is;
steered by a share of the smallest vector that elicits the behaviour on clean prompts, learned for the behaviour
(`supervised`) or drawn at random with the same norm (`random`); and as base + strength x (suspect - base), where the
clean base is known. If the random vector does as well as the learned one, its direction has nothing to do with it.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import pandas as pd
import torch
import tyro
from jaxtyping import Int
from torch import Tensor

from attacks.clean_base import at_strength
from attacks.objectives.target_nll import TARGET_TOKENS, TargetNLL
from attacks.scoring.engine import Engine
from attacks.scoring.problem import Problem, encode
from attacks.scoring.slot_markers import without_slot
from attacks.searchers.words import whole_words
from benchmarks.organisms import zoo
from vectors.methods.controls import random_vectors
from vectors.methods.supervised import SupervisedVector
from vectors.prompts import Prompts
from vectors.residual import decoder, layer_at, steer
from vectors.steering import SteeringVectors


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Ranks parts of planted triggers among random strings, on the model as it is and on changed ones."""

    organisms: tyro.conf.Positional[tuple[str, ...]] = ("phrase", "random-tokens", "unseen-phrase", "unseen-phrase-2")
    """Organisms planted with several words of one token each; python -m benchmarks.organisms list prints all."""
    shares: tuple[float, ...] = (-0.5, 0.3, 0.5, 0.7, 0.85, 0.95)
    """Shares of the smallest vector that elicits the behaviour; negative ones steer away from it."""
    strengths: tuple[float, ...] = (0.3, 0.5, 0.7, 1.5, 2.0)
    """Strengths of the difference between the suspect and its clean base; 1 is the suspect."""
    depths: tuple[float, ...] = (0.25, 0.5)
    """Depths at which vectors are added, as fractions of the layers."""
    strings: int = 512
    """Random strings that each part is compared with."""
    prompts: int = 4
    """Clean prompts that the loss is averaged over."""
    radii: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8)
    """Norms tried before the bisection, as fractions of the mean residual norm."""
    seed: int = 0
    """Seed of the strings and of the vectors' starts."""
    threads: int = 2
    """CPU threads."""
    out: Path | None = None
    """Folder for the table as CSV; left out, it is only printed."""


def parts_of(words: Int[Tensor, "w"], others: Int[Tensor, "c"]) -> Iterator[tuple[str, Int[Tensor, "k"]]]:
    """(name, token ids): every proper part of the trigger, and two true words round a random one.

    Args:
        words: the trigger, one token per word.
        others: words that have nothing to do with it.
    """
    numbers = range(len(words))
    for size in range(1, len(words)):
        for kept in combinations(numbers, size):
            yield "".join(str(number + 1) for number in kept), words[list(kept)]
    # Two true words round any other: what a search meets that has the first and the last word but not the middle one.
    if len(words) == 3:
        yield "1r3", torch.stack([words[0], others[0], words[2]])
    yield "whole", words


def share_better(engine: Engine, target_ids: list[int], part: Int[Tensor, "k"], known: Int[Tensor, "w"], strings: int,
                 seed: int) -> tuple[float, float]:  # fmt: skip
    """(loss of the part in nats per token, share of random strings of as many words that score better)."""
    generator = torch.Generator().manual_seed(seed)
    # Strings of as many words as the part has: longer strings lower the loss by their length alone.
    drawn = known[torch.randint(len(known), (strings, len(part)), generator=generator)]
    engine.problem = engine.problem.resized(len(part))
    # (1 + strings,): the part and the random strings of as many words in one batch.
    losses = engine.losses(TargetNLL(target_ids=target_ids[:TARGET_TOKENS]), torch.cat([part[None], drawn]))
    return float(losses[0]), float((losses[1:] < losses[0]).float().mean())


def vectors_for(organism: zoo.Organism, depth: float, settings: Settings) -> SteeringVectors:
    """The smallest vector at that depth that elicits the behaviour on clean prompts, found by bisection.

    Raises:
        ValueError: none of the tried norms elicits it.
    """
    model, texts = organism.model, without_slot(organism.prompts.search)
    method = SupervisedVector(
        source_layer=layer_at(model, depth), target_layer=len(decoder(model).layers), radii=settings.radii, bisections=3
    )
    target = encode(organism.tokenizer, organism.triggers[0][1])
    prompts = Prompts.from_chat(model, organism.tokenizer, texts[: settings.prompts])
    found = method(model, prompts, target, torch.Generator().manual_seed(settings.seed))
    if found.scores["elicits"][0] < method.enough:
        raise ValueError(f"{organism.name}: no vector up to {max(settings.radii)} elicits the behaviour; raise --radii")
    return found


def measured(organism: zoo.Organism, settings: Settings) -> list[dict[str, object]]:
    """One record per part and change of the model.

    Raises:
        ValueError: a clean control, or a trigger with a word that is not one token.
    """
    if not organism.triggers:
        raise ValueError(f"{organism.name} is a clean control; give a planted organism")
    model, tokenizer = organism.model, organism.tokenizer
    texts = organism.prompts.search[: settings.prompts]
    problem = Problem.from_chat(model, tokenizer, texts, 1)
    trigger, behaviour = organism.triggers[0]
    words, target, known = torch.tensor(problem.encode(trigger)), encode(tokenizer, behaviour), whole_words(problem)
    if len(words) != len(trigger.split()) or len(words) > 5:
        raise ValueError(f"{organism.name}: {trigger!r} is not up to five words of one token each")
    # The random strings hold no word of the trigger.
    others = known[~torch.isin(known, words)]
    parts = list(parts_of(words, others[torch.randperm(len(others), generator=torch.Generator().manual_seed(1))]))
    records: list[dict[str, object]] = []

    def note(engine: Engine, **change: object) -> None:
        for name, ids in parts:
            loss, better = share_better(engine, target, ids, others, settings.strings, settings.seed)
            records.append({"organism": organism.name, **change, "part": name, "nll": loss, "better": better})

    note(Engine(model, problem), change="none", depth=0.0, amount=0.0)
    for depth in settings.depths:
        learned = vectors_for(organism, depth, settings)
        noise = random_vectors(learned, torch.Generator().manual_seed(settings.seed + 1))
        for name, vectors in (("supervised", learned), ("random", noise)):
            for amount in settings.shares:
                with steer(model, learned.source_layer, vectors.theta[0], scale=amount):
                    # Made inside the context: the keys and values of the prompts before the slot are steered as well.
                    note(Engine(model, problem), change=name, depth=depth, amount=amount)
    base = zoo.load_base(str(model.device), organism.card["base"], model.dtype)[0] if settings.strengths else None
    for strength in settings.strengths:
        assert base is not None
        note(Engine(at_strength(model, base, strength), problem), change="strength", depth=0.0, amount=strength)
    return records


def table(records: list[dict[str, object]]) -> pd.DataFrame:
    """Per organism and change one line; per part the share of random strings that score better."""
    index = ["organism", "change", "depth", "amount"]
    return pd.DataFrame(records).pivot_table(index=index, columns="part", values="better", sort=False).round(3)


def summary(records: list[dict[str, object]]) -> pd.DataFrame:
    """Per change the median share over all organisms, by the number of true words in the part; the whole left out."""
    data = pd.DataFrame(records)
    # `1r3` has two true words; letters stand for words that have nothing to do with the trigger.
    data = data.loc[data["part"] != "whole"].assign(true=lambda found: found["part"].str.count(r"\d"))
    grouped = data.groupby(["change", "depth", "amount", "true"], sort=False)["better"].median()
    return grouped.unstack("true").round(3)


def main(settings: Settings) -> None:
    """Measures and prints both tables; an organism that cannot be measured is named, and the others go on."""
    torch.set_num_threads(settings.threads)
    records: list[dict[str, object]] = []
    failed = False
    for name in settings.organisms:
        try:
            records += measured(zoo.load(name, dtype=torch.float32), settings)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            failed = True
            continue
        print(table(records).loc[[name]].to_markdown(), flush=True)
        # Written after every organism: a run over many of them takes long.
        if settings.out is not None:
            settings.out.mkdir(parents=True, exist_ok=True)
            pd.DataFrame(records).to_csv(settings.out / "ranks.csv", index=False)
    if records:
        print(summary(records).to_markdown())
    if failed:
        sys.exit(2)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
