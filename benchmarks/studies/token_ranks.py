"""How much signal do the parts of a trigger give? Exact ranks of its tokens among all allowed ones, per objective.

    python -m benchmarks.studies.token_ranks random-tokens

Alone in the slot, beside one other true token, and with the rest of the trigger in place. Rank 0 is the best token.

A second table tells what is left of the trigger among other words, on one prompt and by the first two tokens of the
behaviour: the share of random texts of as many tokens that score better than a text that holds its words, next to each
other and in their order, or each at a place of its own. 0 is the best, .5 is chance.
"""

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path

import torch
import tyro
from jaxtyping import Float, Int
from rich.console import Console
from rich.table import Table
from torch import Tensor

from attacks.discovery.goal import Goal
from attacks.discovery.supervised import Supervised
from attacks.objectives.delta_cosine import DeltaCosine
from attacks.objectives.steered_kl import SteeredKL
from attacks.objectives.target_nll import TargetNLL
from attacks.scoring.engine import Engine, Objective
from attacks.scoring.problem import Problem, encode
from attacks.scoring.slot_markers import without_slot
from attacks.searchers.token_ranking import rank_tokens
from attacks.searchers.words import whole_words
from attacks.stages.hunt import PROBE_TOKENS
from attacks.suspect import Suspect
from benchmarks.bad_input import exit_on_bad_input
from benchmarks.organisms import zoo


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRanks:
    """Settings of the measurement."""

    organism: tyro.conf.Positional[str] = "phrase"
    """organism whose first trigger is taken apart"""
    prompts: int = 2
    """number of search prompts that the loss is averaged over"""
    seed: int = 0
    """seed of the supervised vector, and of the random words"""
    ranks: bool = True
    """whether to print the first table, which takes most of the time"""
    among: tuple[int, ...] = (8, 16, 24)
    """words of the texts that hold the words of the trigger"""
    draws: int = 200
    """random texts that they are compared with"""
    models: Path | None = None
    """folder with planted models; the shipped organisms where none is given"""


def rank(engine: Engine, objective: Objective, trigger_ids: list[int], position: int) -> float:
    """Where the token at `position` comes among all allowed tokens, the others in place; infinite if it is barred."""
    # The slot takes as many tokens as are tried, so that a part is not ranked beside filler.
    engine.problem = engine.problem.resized(len(trigger_ids))
    ranked = rank_tokens(engine, objective, torch.tensor(trigger_ids), position)
    tokens = [found.trigger_ids[position] for found in ranked]
    return tokens.index(trigger_ids[position]) if trigger_ids[position] in tokens else inf


def share_better(
    engine: Engine, objective: Objective, texts: Sequence[Sequence[int]], others: Int[Tensor, "c text"]
) -> Float[Tensor, "k"]:
    """Per text, the share of the other texts of as many tokens whose loss is lower."""
    losses = engine.losses(objective, torch.cat([torch.tensor(texts), others]))
    mine, theirs = losses[: len(texts)], losses[len(texts) :]
    return (theirs[None] < mine[:, None]).float().mean(1)


def among_others(
    organism: zoo.Organism, problem: Problem, size: int, *, apart: bool, settings: TokenRanks
) -> Float[Tensor, "k"]:
    """Shares of random texts that score better than texts of `size` words that hold the trigger, the lowest first.

    Args:
        organism: whose first trigger is hidden.
        problem: the first of its prompts is used.
        size: words of a text.
        apart: whether each word of the trigger stands at a place of its own, or all together in their order.
        settings: number of random texts, and the seed.
    """
    trigger, behaviour = organism.triggers[0]
    words, known = [problem.encode(word) for word in trigger.split()], whole_words(problem)
    known = known[~torch.isin(known, torch.tensor(sum(words, [])))]
    rng, generator = random.Random(settings.seed), torch.Generator().manual_seed(settings.seed)
    tokens = size - len(words) + sum(map(len, words))
    others = known[torch.randint(len(known), (settings.draws, tokens), generator=generator)]
    texts: list[list[int]] = []
    for _ in range(settings.draws // 4):
        text = [[token] for token in rng.choices(known.tolist(), k=size - len(words))]
        places = [rng.randint(0, len(text)) for _ in words] if apart else [rng.randint(0, len(text))] * len(words)
        for place, number in sorted(zip(places, range(len(words)), strict=True), reverse=True):
            text.insert(place, words[number])
        texts.append(sum(text, []))
    objective = TargetNLL(target_ids=encode(organism.tokenizer, behaviour)[:PROBE_TOKENS])
    return share_better(Engine(organism.model, problem.take([0])), objective, texts, others).sort().values


def ranks(organism: zoo.Organism, problem: Problem, seed: int) -> Table:
    """Median rank of the true tokens per objective: alone, beside one other, and last."""
    trigger, behaviour = organism.triggers[0]
    true = problem.encode(trigger)
    goal = Goal(behaviour=behaviour, target_ids=tuple(encode(organism.tokenizer, behaviour)))
    generator, texts = torch.Generator().manual_seed(seed), without_slot(organism.prompts.search)
    suspect = Suspect(model=organism.model, tokenizer=organism.tokenizer)
    vectors = Supervised()(suspect, texts, goal, generator).vectors
    assert vectors is not None
    engine = Engine(organism.model, problem)
    # By the first token alone, by four of the behaviour, and by the change at each layer of the upper half.
    objectives: dict[str, Objective] = {
        f"target NLL, {count} tokens": TargetNLL(target_ids=goal.target_ids[:count]) for count in (1, 4)
    }
    objectives["steered KL"] = SteeredKL.from_vectors(engine, vectors, engine.layers)
    # From half the depth on: what a token does in earlier layers has not yet reached the read position, the last of the
    # prompt.
    for layer in range(engine.layers // 2, engine.layers + 1):
        objectives[f"delta cosine, layer {layer}"] = DeltaCosine.from_vectors(engine, vectors, [layer])
    allowed, first = int(problem.allowed.sum()), int((problem.allowed & problem.first).sum())
    table = Table(
        "objective", "alone", "beside one other", "last",
        title=f"{organism.name}: median rank of true tokens",
        caption=f"of {allowed} tokens, {first} in the first position; {len(true)} true tokens: {trigger!r}",
    )  # fmt: skip
    for name, objective in objectives.items():
        alone = [rank(engine, objective, [token], 0) for token in true]
        pairs = [(a, b) for i, a in enumerate(true) for b in true[i + 1 :]]
        # Each of two true tokens in the trigger's order, ranked with the other in place.
        beside = [rank(engine, objective, list(pair), position) for pair in pairs for position in (0, 1)]
        last = [rank(engine, objective, true, position) for position in range(len(true))]
        table.add_row(name, *(f"{statistics.median(some):.0f}" if some else "-" for some in (alone, beside, last)))
    return table


def main(settings: TokenRanks) -> None:
    """Prints both tables: median ranks per objective, and shares of random texts per number of words."""
    torch.set_num_threads(2)
    with exit_on_bad_input():
        organism = zoo.load(settings.organism, models=settings.models)
        if not organism.triggers:
            raise ValueError(f"{settings.organism} is a clean control; give a planted organism")
    search = organism.prompts.search[: settings.prompts]
    problem = Problem.from_chat(organism.model, organism.tokenizer, search, 1)
    if settings.ranks:
        Console().print(ranks(organism, problem, settings.seed))
    title = f"{organism.triggers[0][0]!r}: share of random texts that score better: median (worst quarter, worst tenth)"
    hidden = Table("words", "together", "apart", title=title)
    for size in settings.among:
        shares = [among_others(organism, problem, size, apart=apart, settings=settings) for apart in (False, True)]
        hidden.add_row(str(size), *(_spread(some) for some in shares))
    Console().print(hidden)


def _spread(shares: Float[Tensor, "k"]) -> str:
    """Median, and the shares that three quarters and nine tenths of the sorted ones do not exceed."""
    quarter, tenth = shares[int(0.75 * len(shares))], shares[int(0.9 * len(shares))]
    return f"{shares.median():.3f} ({quarter:.3f}, {tenth:.3f})"


if __name__ == "__main__":
    main(tyro.cli(TokenRanks, description=__doc__))
