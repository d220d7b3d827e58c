"""Does the behaviour show? Greedy completions with a trigger in place, counted over prompts."""

from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any

import torch
from jaxtyping import Float
from statsmodels.stats.proportion import proportion_confint
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from attacks.scoring.problem import Problem, Where, encode
from vectors.generate import complete
from vectors.prompts import Prompts


def fires(completions: Sequence[str], text: str) -> list[bool]:
    """Which completions begin with the behaviour text, leading white space aside."""
    if not text.strip():
        raise ValueError("the behaviour text is empty; give the text that the trigger should bring about")
    return [completion.strip().startswith(text.strip()) for completion in completions]


def echoes(trigger: str, behaviour: str) -> bool:
    """Whether one piece of the trigger is half of the behaviour: asking for words is no backdoor."""
    asked, wanted = ("".join(text.lower().split()) for text in (trigger, behaviour))
    match = SequenceMatcher(None, asked, wanted, autojunk=False).find_longest_match()
    return 2 * match.size >= max(1, len(wanted))


def completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problem: Problem,
    trigger_ids: Sequence[int],
    *,
    max_new_tokens: int,
) -> list[str]:
    """Greedy completion of every prompt of the problem with the trigger in the slot."""
    prompts = Prompts.from_ids(problem.filled(trigger_ids), device=model.device)
    return complete(model, tokenizer, prompts, max_new_tokens=max_new_tokens, vectors=None, layer=0)


def success_rate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    triggers: Sequence[Sequence[int]],
    texts: Sequence[str],
    behaviour: str,
    *,
    slot: Where = "end",
) -> Float[Tensor, "triggers"]:
    """Share of the prompts on which each trigger brings the behaviour about; no tokens stand for no trigger."""
    problem = Problem.from_chat(model, tokenizer, texts, max((len(ids) for ids in triggers), default=0), slot=slot)
    length = len(encode(tokenizer, behaviour)) + 2
    rates = []
    for ids in triggers:
        answers = completions(model, tokenizer, problem, ids, max_new_tokens=length)
        rates.append(sum(fires(answers, behaviour)) / len(answers))
    return torch.tensor(rates)


def wilson(rate: float, count: int) -> tuple[float, float]:
    """95 % Wilson interval of a share observed on `count` prompts."""
    if count < 1:
        raise ValueError(f"got {count} prompts; an interval needs at least 1")
    interval: Any = proportion_confint(round(rate * count), count, alpha=0.05, method="wilson")
    return float(interval[0]), float(interval[1])
