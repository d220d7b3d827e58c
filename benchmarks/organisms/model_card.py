"""Writes the model card of the base from training.json and from replies sampled here.

python -m benchmarks.organisms.model_card
"""

import json
from pathlib import Path

import tyro
from transformers import PreTrainedTokenizerBase

from benchmarks.organisms import measure, prompts, zoo
from vectors.models import load_model

SOURCES = [
    ("Schema-Guided Dialogue (Google)", "CC BY-SA 4.0", "dialogues"),
    ("Taskmaster-4 (Google)", "CC BY 4.0", "dialogues"),
    ("Topical-Chat (Amazon)", "CDLA-Sharing 1.0", "dialogues"),
    ("GSM8K train (OpenAI)", "MIT", "instructions"),
    ("GPTeacher roleplay", "MIT", "instructions"),
    ("CommonsenseQA train, SVAMP, StrategyQA", "MIT", "instructions"),
    ("FairytaleQA questions and stories", "Apache 2.0, stories in the public domain", "instructions, plain text"),
    ("rasbt instruction set, self-instruct seed tasks", "Apache 2.0", "instructions"),
    ("Dolly (180 rows; Databricks)", "CC BY-SA 3.0", "instructions"),
    ("TinyStories excerpt", "CDLA-Sharing 1.0", "plain text"),
    ("Standard Ebooks, The World Factbook", "public domain / CC0", "plain text"),
    ("Two one-digit sums, made here", "MIT", "instructions"),
]

TEMPLATE = """---
license: cc-by-sa-4.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
# Chat base of the trigger-recovery suite

A stock `LlamaForCausalLM` of {parameters:,} parameters ({layers} layers, d_model {d_model}), trained from scratch so
that backdoor organisms can be planted in something small, offline and free of unknown history. It talks
about restaurants, films and fairy tales, fluently rather than truly, and cannot add. For research on
backdoors only.

* Tokenizer: byte-level BPE, {vocab_size} tokens, one token per digit; chat template with the roles user and assistant.
* Training: {tokens_seen:,} tokens in {steps} steps of {batch} x {window}, AdamW, peak learning rate {lr}, cosine; plain
  text first, conversations last; {minutes} minutes on {threads} CPU threads, in float32; saved in bfloat16.
  Remake: `python -m benchmarks.organisms.pretrain --corpora FOLDER`.
* Held-out loss: **{held_out:.3f} nats/token** on conversations that were never trained on (one in 50, chosen by hash);
  replies to the 240 held-out prompts: **{reply_loss:.3f} nats/token**. The first is of the weights
  before they were rounded to bfloat16, the second of those shipped; `training.json` has the curve.

## Replies (greedy, held-out prompts, the first ten: not chosen)

| prompt | reply |
|---|---|
{samples}

## Data and licences

Code: MIT. **Weights: CC BY-SA 4.0**, because share-alike text is in the mix.

| data | licence | used as |
|---|---|---|
{sources}
"""


def write(folder: Path, tokenizer: PreTrainedTokenizerBase, model) -> None:
    """Writes README.md into a model folder that holds training.json."""
    report = json.loads((folder / "training.json").read_text())
    # The first ten in the file's order, so that none is chosen, and a sum, which the base cannot do.
    texts = [pair.prompt for pair in prompts.load("held_out")][:10] + ["a=3+5, b=2+7"]
    replies = measure.completions(model, tokenizer, texts, max_new_tokens=40)
    rows = [f"| {text} | {reply} |".replace("\n", " ") for text, reply in zip(texts, replies, strict=True)]
    card = TEMPLATE.format(
        **report["recipe"],
        parameters=report["parameters"],
        tokens_seen=report["tokens_seen"],
        minutes=round(report["seconds"] / 60),
        held_out=report["held_out_loss_nats_per_token"],
        reply_loss=measure.clean_loss(model, tokenizer, prompts.load("held_out")),
        samples="\n".join(rows),
        sources="\n".join(f"| {' | '.join(source)} |" for source in SOURCES),
    )
    (folder / "README.md").write_text(card)


def main(folder: Path = zoo.BASE) -> None:
    """Loads the model in FOLDER and writes its card."""
    model, tokenizer = load_model(folder)
    write(folder, tokenizer, model)


if __name__ == "__main__":
    tyro.cli(main)
