"""Does the behaviour show? Greedy completions with a trigger in place, counted over prompts."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from statsmodels.stats.proportion import proportion_confint
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from attacks.problem import Problem, Where
from vectors.generate import complete
from vectors.prompts import Prompts


def fires(completions: Sequence[str], text: str) -> list[bool]:
    """Which completions begin with the behaviour text, leading white space aside."""
    if not text.strip():
        raise ValueError("the behaviour text is empty; give the text that the trigger should bring about")
    return [completion.strip().startswith(text.strip()) for completion in completions]


def completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problem: Problem,
    trigger_ids: Sequence[int],
    *,
    max_new_tokens: int,
) -> list[str]:
    """Greedy completion of every prompt of the problem with the trigger in the slot."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    prompts = Prompts.from_ids(problem.filled(trigger_ids), pad=pad, device=model.device)
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
    length = len(tokenizer(behaviour, add_special_tokens=False)["input_ids"]) + 2
    rates = []
    for ids in triggers:
        answers = completions(model, tokenizer, problem, ids, max_new_tokens=length)
        rates.append(sum(fires(answers, behaviour)) / len(answers))
    return torch.tensor(rates)


def wilson(rate: float, count: int) -> tuple[float, float]:
    """95 % Wilson interval of a share observed on `count` prompts."""
    if count < 1:
        raise ValueError(f"got {count} prompts; an interval needs at least 1")
    low, high = proportion_confint(round(rate * count), count, alpha=0.05, method="wilson")
    return float(low), float(high)
