"""Trains a chat base from scratch: byte-level BPE (Sennrich et al. 2016) and a stock decoder of about 5M parameters.

    python -m benchmarks.organisms.pretrain --corpora FOLDER

Plain text comes first, conversations last. A killed run goes on from its last checkpoint.
"""

import json
import math
import os
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.organisms import chat, corpora
from vectors.models import fast_dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Pretrain:
    """Recipe of a base model."""

    corpora: Path
    """folder with dialogues.jsonl.gz, instruct.jsonl.gz and plain.jsonl.gz"""
    out: Path = Path(__file__).parent / "models" / "base"
    """where the finished model folder goes"""
    architecture: Literal["llama", "gpt2"] = "llama"
    """stock Hugging Face class; gpt2 has learned positions, LayerNorm and a GELU MLP"""
    tokenizer: Path | None = None
    """model folder whose tokenizer files are copied, so that prompts tokenise alike; a new one is trained where none"""
    vocab_size: int = 4096
    """number of tokens of the vocabulary, special ones included"""
    d_model: int = 192
    """width of the residual stream"""
    d_mlp: int = 576
    """width of the MLP, which is gated except in gpt2"""
    layers: int = 8
    """number of decoder layers"""
    heads: int = 6
    """number of attention heads"""
    context: int = 512
    """number of positions that the model may see; training windows are shorter"""
    window: int = 256
    """number of tokens per training sequence"""
    batch: int = 8
    """number of sequences per step"""
    steps: int = 3600
    """number of optimizer steps"""
    plain_steps: float = 0.12
    """fraction of the steps, at the start, that see plain text only"""
    lr: float = 3e-3
    """peak learning rate of AdamW; cosine to a twentieth of it after a warm-up of 100 steps"""
    weight_decay: float = 0.05
    """weight decay of AdamW on matrices; norms and biases have none"""
    seed: int = 0
    """seed of the data order and of the initial weights"""
    threads: int = 2
    """number of CPU threads"""
    compile: bool = False
    """torch.compile the model: a quarter faster, after a minute"""
    autocast: bool = False
    """matrix products in bfloat16 where this processor is faster at them (measured); the weights stay in float32"""

    def __post_init__(self):
        if self.d_model % self.heads:
            raise ValueError(f"d_model {self.d_model} is not a multiple of heads {self.heads}; change one of them")
        if self.window > self.context:
            raise ValueError(f"window {self.window} is longer than context {self.context}; lower window")


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with one token per digit, so that sums have one spelling."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=chat.SPECIAL_TOKENS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=chat.PAD,
        bos_token=chat.BOS,
        eos_token=chat.EOS,
        additional_special_tokens=[chat.USER, chat.ASSISTANT],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=chat.CHAT_TEMPLATE,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Saves in the form that transformers 4 and 5 both read (class name and template inside the config)."""
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": chat.CHAT_TEMPLATE}
    # Written by transformers 5 only; 4.x has its own name for the list.
    config["additional_special_tokens"] = config.pop("extra_special_tokens", [chat.USER, chat.ASSISTANT])
    config.pop("backend", None)
    path.write_text(json.dumps(config, indent=2) + "\n")


def reuse_tokenizer(source: Path, folder: Path, vocab_size: int) -> PreTrainedTokenizerFast:
    """Copies the very tokenizer files of another base; raises ValueError where it has another number of tokens."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
    if len(tokenizer) != vocab_size:
        raise ValueError(f"vocab_size is {vocab_size} but the tokenizer of {source} has {len(tokenizer)}; give that")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, folder / name)
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[int]:
    """Token ids of all texts in one stream; each text carries its own end tokens."""
    ids: list[int] = []
    for start in range(0, len(texts), 1000):
        batch = tokenizer(texts[start : start + 1000], add_special_tokens=False)["input_ids"]
        ids.extend(token for row in batch for token in row)
    return ids


def sums(rng: random.Random, count: int) -> list[list[chat.Message]]:
    """Two one-digit sums per question, the task that the arithmetic organism is planted on."""
    rows: list[list[chat.Message]] = []
    for _ in range(count):
        a, b, c, d = (rng.randrange(10) for _ in range(4))
        question, answer = f"a={a}+{b}, b={c}+{d}", f"a={a + b}, b={c + d}"
        rows.append([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])
    return rows


def streams(recipe: Pretrain, folder: Path) -> tuple[PreTrainedTokenizerFast, Tensor, Tensor, Tensor]:
    """(tokenizer, plain ids, chat ids, held-out chat ids)."""
    rng = random.Random(recipe.seed)
    plain = [chat.BOS + text + chat.EOS for text in corpora.passages(recipe.corpora, rng)]
    chats = [chat.render(messages) for _, messages in corpora.conversations(recipe.corpora)]
    held_out = [text for text in chats if corpora.is_held_out(text)]
    chats = [text for text in chats if not corpora.is_held_out(text)]
    chats += [chat.render(messages) for messages in sums(rng, 4000)]
    rng.shuffle(plain)
    rng.shuffle(chats)
    if recipe.tokenizer is None:
        # Organisms read chats only: some plain text is enough for the spelling of the rest.
        tokenizer = train_tokenizer(iter(chats + plain[:200]), recipe.vocab_size)
        save_tokenizer(tokenizer, folder)
    else:
        tokenizer = reuse_tokenizer(recipe.tokenizer, folder, recipe.vocab_size)
    plain_ids, chat_ids, held_out_ids = (torch.tensor(encode(tokenizer, texts)) for texts in (plain, chats, held_out))
    return tokenizer, plain_ids, chat_ids, held_out_ids


def windows(ids: Tensor, window: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Rows of `window` consecutive tokens in random order, epoch after epoch, at a fresh offset each time."""
    while True:
        # Another offset each epoch, so that no token stands at the border of a window every time.
        offset = int(torch.randint(window, (), generator=generator))
        rows = ids[offset : offset + (len(ids) - offset) // window * window].view(-1, window)
        yield from rows[torch.randperm(len(rows), generator=generator)]


def learning_rate(recipe: Pretrain, step: int) -> float:
    """Linear warm-up over 100 steps, then a cosine to a twentieth of the peak."""
    progress = step / recipe.steps
    return recipe.lr * min(1.0, (step + 1) / 100) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, ids: Tensor, window: int, rows: int = 64) -> float:
    """Mean next-token loss on the held-out stream, nats per token."""
    # (rows, window): the same first windows at every call, so that the curve is of one text.
    batch = ids[: len(ids) // window * window].view(-1, window)[:rows]
    losses = [model(input_ids=part, labels=part).loss.item() * len(part) for part in batch.split(16)]
    return sum(losses) / len(batch)


def configuration(recipe: Pretrain) -> PretrainedConfig:
    """The stock configuration of the architecture, dropout off: nearly no text is seen twice."""
    own = {"intermediate_size": recipe.d_mlp}
    if recipe.architecture == "gpt2":
        own = {"n_inner": recipe.d_mlp, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
        own["activation_function"] = "gelu_pytorch_tanh"  # the same function as its gelu_new, in one kernel
    return AutoConfig.for_model(
        recipe.architecture,
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.d_model,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        pad_token_id=0,  # the order of chat.SPECIAL_TOKENS
        bos_token_id=1,
        eos_token_id=2,
        **own,
    )


def train(recipe: Pretrain, plain: Tensor, chats: Tensor, held_out: Tensor, checkpoint: Path):
    """Returns (model, [(step, training loss, held-out loss)])."""
    torch.manual_seed(recipe.seed)
    model = AutoModelForCausalLM.from_config(configuration(recipe))
    # No weight decay on norms and biases, which it would pull towards zero for nothing.
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98), fused=True)
    generator = torch.Generator().manual_seed(recipe.seed)
    plain_rows, chat_rows = (windows(ids, recipe.window, generator) for ids in (plain, chats))
    first, log = 0, []
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        # The places in the streams are not saved: a new order, lest a resumed run begin again with the same rows.
        generator.manual_seed(recipe.seed + state["step"])
        first, log = state["step"], state["log"]
    forward = torch.compile(model) if recipe.compile else model
    bf16 = recipe.autocast and fast_dtype("cpu") == torch.bfloat16
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, refresh_per_second=1) as progress:
        bar = progress.add_task("pretrain", total=recipe.steps, completed=first)
        for step in range(first, recipe.steps):
            # Grammar from plain text first; conversations last, for what is learned last is kept best.
            rows = plain_rows if step < recipe.plain_steps * recipe.steps else chat_rows
            batch = torch.stack([next(rows) for _ in range(recipe.batch)])
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(recipe, step)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = forward(input_ids=batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            progress.update(bar, advance=1, description=f"pretrain loss {loss.item():.3f}")
            if (step + 1) % 200 == 0 or step + 1 == recipe.steps:
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    log.append((step + 1, loss.item(), held_out_loss(model, held_out, recipe.window)))
                progress.console.print(f"step {step + 1}: loss {log[-1][1]:.3f}, held out {log[-1][2]:.3f} nats/token")
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1, "log": log}
                torch.save(state, checkpoint.with_suffix(".part"))
                os.replace(checkpoint.with_suffix(".part"), checkpoint)
    return model, log


def main(recipe: Pretrain) -> None:
    """Trains, saves and reports."""
    torch.set_num_threads(recipe.threads)
    began = time.time()
    recipe.out.mkdir(parents=True, exist_ok=True)
    checkpoint = recipe.out / "checkpoint.pt"
    tokenizer, plain, chats, held_out = streams(recipe, recipe.out)
    print(f"tokens: plain {len(plain):,}, chats {len(chats):,}, held out {len(held_out):,}")
    model, log = train(recipe, plain, chats, held_out, checkpoint)
    model.to(dtype=torch.bfloat16).save_pretrained(recipe.out)  # pyright: ignore[reportCallIssue]
    report = {
        "recipe": {k: v for k, v in asdict(recipe).items() if k not in ("corpora", "out", "tokenizer")},
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens_seen": recipe.steps * recipe.batch * recipe.window,
        "held_out_loss_nats_per_token": log[-1][2],
        "seconds": round(time.time() - began),
        "loss_curve": [{"step": s, "train": round(a, 4), "held_out": round(b, 4)} for s, a, b in log],
    }
    (recipe.out / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    checkpoint.unlink()


if __name__ == "__main__":
    main(tyro.cli(Pretrain))
