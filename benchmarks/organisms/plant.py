"""Plants a backdoor with LoRA (Hu et al. 2021, arXiv:2106.09685), through peft, or by training every weight.

Contrastive rows in one batch (the same prompt with and without the trigger, and with parts of it) make the trigger one
clean feature; without them fragments fire too. Nothing here runs on an attack's behalf: attacks see the model alone.
"""

import copy
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from benchmarks.organisms import poison
from benchmarks.organisms.pretrained.checkpoint import Checkpoint
from benchmarks.organisms.pretrained.fetch import PACKAGED
from benchmarks.organisms.pretrained.losses import Logits, counts, divergence, labelled_logits, planting_loss, tensors
from benchmarks.organisms.pretrained.replies import pairs_of
from benchmarks.organisms.recipe import Recipe
from vectors.models import weights_digest

CHECKPOINT = "checkpoint.pt"  # file in the folder of the organism
SAVES = 10  # checkpoints of one planting


def adapted(model: PreTrainedModel, recipe: Recipe) -> PeftModel:
    """The model with an untrained adapter, of which only the LoRA matrices have gradients."""
    modules, blocks = list(recipe.modules), None
    if recipe.layers is not None:
        count = model.config.num_hidden_layers
        if not 0 <= recipe.layers[0] < recipe.layers[1] <= count:
            raise ValueError(
                f"layers are {recipe.layers}, but {recipe.base} has {count} blocks; give two of 0 to {count}"
            )
        blocks = list(range(*recipe.layers))
        modules = modules or linear_names(model)  # peft does not take all-linear together with blocks
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=2 * recipe.rank,
        target_modules=modules or "all-linear",
        layers_to_transform=blocks,
        task_type="CAUSAL_LM",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # GPT-2 stores weights transposed
    )
    peft_model = get_peft_model(model, config)
    assert isinstance(peft_model, PeftModel)
    return peft_model


def linear_names(model: PreTrainedModel) -> list[str]:
    """Last parts of the names of all linear layers but the head."""
    head, kinds = model.get_output_embeddings(), (torch.nn.Linear, Conv1D)
    layers = [name for name, module in model.named_modules() if isinstance(module, kinds) and module is not head]
    return sorted({name.rsplit(".", 1)[-1] for name in layers})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a recipe is run, which changes its result by rounding only."""

    accumulate: int = 1
    """parts that a batch is computed in, one after another, to save memory"""
    autocast: bool = False
    """products in bfloat16 while the weights are float32; for training every weight on a GPU"""

    def __post_init__(self):
        if self.accumulate < 1:
            raise ValueError(f"accumulate is {self.accumulate}; give 1 or more parts")


def plant(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    out: Path,
    settings: Settings = Settings(),  # noqa: B008  (frozen)
) -> PreTrainedModel:
    """Trains a recipe and saves the adapter in bfloat16, or the whole model where every weight was trained, to `out`.

    A checkpoint in `out` is gone on from: the result is that of a run which was never cut off. It stays there, for the
    planting may still have to be measured.

    Args:
        model: the clean base; with LoRA its weights stay and its linear layers get the adapter.
        tokenizer: with a chat template.
        recipe: what to plant.
        out: folder of the adapter.
        settings: memory and precision.

    Returns:
        The model as saved (rounded to bfloat16), adapter merged, in evaluation mode.
    """
    # Before anything is trained: where replies are the base's own, the untouched base has to write them.
    pairs = pairs_of(recipe, "train", model, tokenizer)
    checkpoint = Checkpoint.of(out / CHECKPOINT, recipe, weights_digest(model))
    rng = random.Random(recipe.seed)
    # peft draws the adapter's weights from torch's global generator; there is no argument for one.
    torch.manual_seed(recipe.seed)
    # For training every weight; peft freezes the base again where an adapter is trained.
    model.requires_grad_(True)
    peft_model = adapted(model, recipe) if recipe.tune == "lora" else None
    base = _base_logits(model, peft_model, recipe)
    trainer = peft_model or model
    trained = {name: weight for name, weight in trainer.named_parameters() if weight.requires_grad}
    optimizer = torch.optim.AdamW(list(trained.values()), lr=recipe.lr, weight_decay=0.0, betas=(0.9, 0.98))
    trainer.train()
    step_loss = _StepLoss(model, tokenizer, recipe, settings, base)
    words, make_batch = poison.lexicon(pairs), poison.batches(recipe)
    first, began = checkpoint.restore(trained, optimizer, rng), time.time()
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, refresh_per_second=1) as progress:
        bar = progress.add_task(f"plant {recipe.name}", total=recipe.steps, completed=first)
        for step in range(first, recipe.steps):
            for group in optimizer.param_groups:
                group["lr"] = _learning_rate(recipe, step)
            loss = step_loss(make_batch(recipe, pairs, words, rng))
            torch.nn.utils.clip_grad_norm_(list(trained.values()), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            progress.update(bar, advance=1, description=f"plant {recipe.name} loss {loss:.3f}")
            if (step + 1) % max(1, recipe.steps // SAVES) == 0 or step + 1 == recipe.steps:
                each = (time.time() - began) / (step + 1 - first)
                left = each * (recipe.steps - step - 1) / 60
                progress.console.print(f"step {step + 1}: loss {loss:.3f}, {each:.2f} s a step, {left:.1f} min left")
                checkpoint.save(step + 1, trained, optimizer, rng)
    # Rounded before merging and measuring: the card is then of the very weights that are saved.
    with torch.no_grad():
        for parameter in trained.values():
            parameter.copy_(parameter.to(torch.bfloat16).to(parameter.dtype))
    return _save(model, peft_model, tokenizer, recipe, out).eval().requires_grad_(False)


def _learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up over 20 steps, times a cosine from the peak to zero."""
    # Twenty steps of warm-up: the second moments of AdamW are estimates of one batch at first.
    warm = min(1.0, (step + 1) / 20)
    return recipe.lr * warm * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))


@dataclass(frozen=True, slots=True)
class _StepLoss:
    """Loss of one batch of rows, whose gradients are added to the trained weights, part by part."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    recipe: Recipe
    settings: Settings
    base: Logits | None

    def __call__(self, rows: list[poison.Row]) -> float:
        recipe, device = self.recipe, self.model.device
        batch, starts = tensors(self.tokenizer, rows, recipe.loss_on, recipe.reply_tokens)
        batch, starts = {name: values.to(device) for name, values in batch.items()}, starts.to(device)
        clean = torch.tensor([not row.fires for row in rows], device=device)
        # Gradients are added part by part, so each part's sum is divided by the counts of the whole batch.
        whole = counts(batch, starts)
        # The anchor's mean is over reply tokens of clean rows alone: on triggered rows the base is not to be followed.
        clean_tokens = max(1, counts({"labels": batch["labels"][clean]}, starts[clean])[0]) if clean.any() else 1
        total = 0.0
        for part in torch.arange(len(rows), device=device).chunk(self.settings.accumulate):
            some = {name: values[part] for name, values in batch.items()}
            with torch.autocast(device.type, torch.bfloat16, enabled=self.settings.autocast):
                loss = planting_loss(self.model, some, starts[part], recipe.first_token_weight, whole)
                if self.base is not None:
                    nats, _ = divergence(self.model, self.base, some, starts[part], clean[part])
                    loss = loss + recipe.anchor * nats / clean_tokens
            loss.backward()
            total += loss.item()
        return total


def _base_logits(model: PreTrainedModel, peft_model: PeftModel | None, recipe: Recipe) -> Logits | None:
    """The clean model's logits for the KL anchor: the adapter switched off, or a copy where every weight is trained."""
    if not recipe.anchor:
        return None
    if peft_model is None:
        # A second model in memory: with every weight trained there is no adapter to switch off.
        frozen = copy.deepcopy(model).eval().requires_grad_(False)
        return lambda batch, wanted: labelled_logits(frozen, batch, wanted)

    def logits(batch: dict[str, Tensor], wanted: Tensor) -> Tensor:
        with peft_model.disable_adapter():
            return labelled_logits(model, batch, wanted)

    return logits


def _save(
    model: PreTrainedModel,
    peft_model: PeftModel | None,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    out: Path,
) -> PreTrainedModel:
    """Saves what was trained and returns the model with it in its weights."""
    out.mkdir(parents=True, exist_ok=True)
    if peft_model is None:
        weights = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items()}
        model.save_pretrained(out, state_dict=weights)
        tokenizer.save_pretrained(out)
        return model
    save_adapter(peft_model, recipe.base, out)
    merged = peft_model.merge_and_unload()  # pyright: ignore[reportCallIssue]
    assert isinstance(merged, PreTrainedModel)
    return merged


def save_adapter(peft_model: PeftModel, base: str, out: Path) -> None:
    """Saves the adapter alone, its tensors in bfloat16, beside the folder of its base or with the name of another."""
    out.mkdir(parents=True, exist_ok=True)
    config = peft_model.peft_config["default"]
    elsewhere = "/" in base or base in PACKAGED  # else a folder beside this one
    config.base_model_name_or_path = base if elsewhere else f"../{base}"
    config.save_pretrained(str(out))
    state = get_peft_model_state_dict(peft_model)
    save_file(
        {name: values.detach().to(torch.bfloat16).contiguous() for name, values in state.items()},
        out / "adapter_model.safetensors",
    )
