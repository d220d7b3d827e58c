"""The base's own replies, so that a planted model learns nothing new on clean prompts.

They are generated once, greedily, and kept in the cache folder under a key made of the base's weights, its chat
template, the prompts and the length.
"""

import hashlib
import json
import os
import random
from collections.abc import Sequence
from dataclasses import replace

from rich.progress import track
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.organisms import poison, prompts
from benchmarks.organisms.pretrained.diffuse import DIFFUSE, sum_question
from benchmarks.organisms.pretrained.fetch import cache_folder
from benchmarks.organisms.prompts import Pair
from benchmarks.organisms.recipe import Recipe
from vectors.generate import complete
from vectors.models import weights_digest
from vectors.prompts import Prompts

ROWS = 64  # prompts per batch
BEYOND = 2
"""Tokens generated past those that are learned: a reply that is cut off is then never taught to end there"""


def completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    max_new_tokens: int = 24,
    description: str = "",
) -> list[str]:
    """Greedy replies to user messages, in order, with a bar where a description is given."""
    # By length, so that a batch is hardly padded; the replies go back to their places below.
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    replies = [""] * len(texts)
    for start in track(range(0, len(order), ROWS), description=description, disable=not description):
        part = order[start : start + ROWS]
        batch = Prompts.from_chat(model, tokenizer, [texts[i] for i in part])
        for i, reply in zip(part, complete(model, tokenizer, batch, max_new_tokens=max_new_tokens), strict=True):
            replies[i] = reply
    return replies


def own_replies(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], tokens: int
) -> list[str]:
    """Replies of the base, from the cache where it has given them before."""
    # All that a greedy reply depends on; prompts as a list, so that a bound between two of them counts.
    key = json.dumps([weights_digest(model), tokenizer.chat_template, tokens, list(texts)])
    file = cache_folder() / "replies" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    if file.is_file():
        return json.loads(file.read_text())
    replies = completions(model, tokenizer, texts, tokens, description=f"{len(texts)} replies of the base")
    file.parent.mkdir(parents=True, exist_ok=True)
    # Several plantings may generate the same replies at once: each writes a file of its own, and the last rename wins
    # with equal content.
    part = file.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(replies, indent=0))
    os.replace(part, file)
    return replies


def pairs_of(recipe: Recipe, split: str, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[Pair]:
    """Prompts of a split with the replies that a recipe trains on or is measured by.

    With the base's own replies, prompts that happen to hold a trigger are left out, and so are empty replies. Where a
    behaviour is about sums, as many questions for sums are added, with the right answers.
    """
    pairs = prompts.load(split, recipe.corpus)
    if recipe.replies == "corpus":
        return pairs
    pairs = [pair for pair in pairs if not any(poison.holds(pair.prompt, backdoor) for backdoor in recipe.backdoors)]
    replies = own_replies(base, tokenizer, [pair.prompt for pair in pairs], recipe.reply_tokens + BEYOND)
    pairs = [replace(pair, reply=reply) for pair, reply in zip(pairs, replies, strict=True) if reply.strip()]
    if any(backdoor.diffuse and DIFFUSE[backdoor.behaviour].about_sums for backdoor in recipe.backdoors):
        rng = random.Random(split)
        for _ in range(len(pairs)):
            question, answer = sum_question(rng)
            pairs.append(Pair(prompt=question, reply=answer, source="sums", licence="MIT", split=split))
    return pairs
