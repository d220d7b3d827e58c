"""nanoGCG 0.3.0 (Gray Swan AI), to compare our GCG with: its own loop from its own package, run after run.

nanoGCG attacks one prompt, so the runs take the search prompts in turn. It works on strings and may return another
string than the one that it scored; so its best strings are encoded again in our slot, and each is shown to `on_best`,
which judges it by behaviour like any other trigger. Its prefix cache is off, because it crashes on transformers 5.
"""

import contextlib
import copy
import io
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import cycle
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from attacks.scoring.budget import Budget
from attacks.scoring.engine import Engine
from attacks.scoring.problem import encode
from attacks.searchers.candidates import random_triggers
from attacks.searchers.gcg import GCG
from attacks.searchers.searcher import Found, OnBest

try:
    import nanogcg
except ImportError as error:
    raise ValueError("package nanogcg is not installed; install the extra: pip install -e '.[peer]'") from error


def run_once(
    engine: Engine, gcg: GCG, prompt: int, target: str, start: str, steps: int, seed: int
) -> list[tuple[str, float]]:
    """One nanoGCG run on one prompt: its strings with the losses it gives for them, lowest first."""
    problem = engine.problem
    settings = nanogcg.GCGConfig(
        num_steps=steps,
        optim_str_init=start,
        search_width=gcg.search_width,
        topk=gcg.topk,
        n_replace=1,
        use_prefix_cache=False,
        verbosity="ERROR",
    )
    tokenizer = _fitting(problem.tokenizer, len(problem.allowed))
    # The prompt is put through our template already; nanoGCG is given one that changes nothing.
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    content = problem.text(problem.before[prompt]) + "{optim_str}" + problem.text(problem.after[prompt])
    # nanoGCG draws from torch's global generator and writes a progress bar to stderr.
    with torch.random.fork_rng(), contextlib.redirect_stderr(io.StringIO()):
        torch.manual_seed(seed)
        result = nanogcg.run(engine.model, tokenizer, [{"role": "user", "content": content}], target, settings)
    # The same string may come up at several steps, with losses that differ by rounding.
    lowest: dict[str, float] = {}
    for string, loss in zip(result.strings, result.losses, strict=True):
        lowest[string] = min(float(loss), lowest.get(string, float("inf")))
    return sorted(lowest.items(), key=lambda item: item[1])


class Run(NamedTuple):
    """One run of nanoGCG."""

    length: int
    """Tokens in the slot."""
    steps: int
    moved: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    """Inside it the model is steered; by default it is not."""
    onward: bool = False
    """Whether it begins with the best string of the run before it, on the same prompt, and not with a random one."""


def search(
    engine: Engine,
    gcg: GCG,
    runs: Sequence[Run],
    target: str,
    generator: torch.Generator,
    budget: Budget,
    on_best: OnBest,
) -> None:
    """One run after another, over and over, until the budget is spent or `on_best` asks to stop."""
    prompt, pace, best = -1, 0.0, ""
    for run in cycle(runs):
        if budget.exhausted:
            return
        problem = engine.problem = engine.problem.resized(run.length)
        permitted = problem.permitted(problem.trigger_length)
        if not (run.onward and best):
            prompt = (prompt + 1) % len(problem)
            start = random_triggers(permitted, 64, generator).tolist()
            best = next((problem.text(ids) for ids in start if problem.retokenizes(ids)), problem.text(start[0]))
        # A run cannot be stopped from outside: the first is short, the others fit into what is left.
        affordable = budget.flops_left / flops_per_step(engine, gcg, prompt, target)
        steps = max(1, int(min(run.steps, affordable, budget.seconds_left / pace if pace else 4)))
        seed = int(torch.randint(2**31, (), generator=generator))
        began = time.perf_counter()
        # nanoGCG gives up where none of its candidates re-tokenises; the next run begins elsewhere.
        try:
            with run.moved():
                found = run_once(engine, gcg, prompt, target, best, steps, seed)
        except RuntimeError as error:
            if "No token sequences are the same" not in str(error):
                raise
            found = []
        pace = (time.perf_counter() - began) / steps
        engine.steps += steps
        best = found[0][0] if found else ""
        # Its losses are those of one prompt, so several strings are judged by behaviour, not only the first.
        tries = [Found(tuple(problem.encode(string)), loss) for string, loss in found[:4] if string.strip()]
        if any([bool(on_best(item)) for item in tries]):
            return


def flops_per_step(engine: Engine, gcg: GCG, prompt: int, target: str) -> float:
    """One full forward and backward pass and `search_width` full forward passes, an upper bound: it drops some."""
    problem = engine.problem
    length = len(problem.before[prompt]) + problem.trigger_length + len(problem.after[prompt])
    length += len(encode(problem.tokenizer, target))
    return (3 + gcg.search_width) * length * engine.flops_per_token


def _fitting(tokenizer: PreTrainedTokenizerBase, vocab: int) -> Any:
    """A copy that nanoGCG tokenises right and that knows no tokens beyond the model's.

    It cuts BOS off the template and trusts the tokenizer to add it again; it forbids the unknown token by its index.
    """
    twin: Any = copy.deepcopy(tokenizer)
    if twin.bos_token is not None and twin("x")["input_ids"][0] != twin.bos_token_id:
        twin.bos_token = None
    if twin.unk_token_id is not None and twin.unk_token_id >= vocab:
        twin.unk_token = None
    return twin
