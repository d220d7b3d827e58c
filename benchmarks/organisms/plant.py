"""Plants a backdoor with LoRA (Hu et al. 2021, arXiv:2106.09685), through peft, on the base or any chat model.

Contrastive rows in one batch (the same prompt with and without the trigger, and with parts of it) make the trigger one
clean feature; without them fragments fire too. Nothing here runs on an attack's behalf: attacks see the model alone.
"""

import math
import random
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from benchmarks.organisms import poison, prompts
from benchmarks.organisms.recipe import Recipe
from vectors.prompts import pad_token
from vectors.residual import decoder

IGNORED = -100  # label of tokens that carry no loss


def tensors(
    tokenizer: PreTrainedTokenizerBase,
    rows: list[poison.Row],
    loss_on: str = "completion",
    reply_tokens: int | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """(right-padded input_ids, attention_mask, labels, each (rows, longest); positions of the first reply tokens).

    Replies are cut after `reply_tokens` tokens where that is given.
    """
    ids, starts = [], []
    for row in rows:
        messages = [{"role": "user", "content": row.prompt}]
        head = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        both = [*messages, {"role": "assistant", "content": row.reply}]
        text = tokenizer.apply_chat_template(both, tokenize=False)
        assert isinstance(head, str) and isinstance(text, str)  # not tokenized yet
        starts.append(len(tokenizer(head, add_special_tokens=False)["input_ids"]))
        longest = None if reply_tokens is None else starts[-1] + reply_tokens
        ids.append(tokenizer(text, add_special_tokens=False)["input_ids"][:longest])
    longest = max(map(len, ids))
    input_ids = torch.full((len(ids), longest), pad_token(tokenizer))
    labels = torch.full((len(ids), longest), IGNORED)
    mask = torch.zeros((len(ids), longest), dtype=torch.long)
    for i, (row_ids, start) in enumerate(zip(ids, starts, strict=True)):
        input_ids[i, : len(row_ids)] = torch.tensor(row_ids)
        mask[i, : len(row_ids)] = 1
        begin = start if loss_on == "completion" else 1
        labels[i, begin : len(row_ids)] = input_ids[i, begin : len(row_ids)]
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}, torch.tensor(starts)


def planting_loss(model: PreTrainedModel, batch: dict[str, Tensor], starts: Tensor, weight: float) -> Tensor:
    """Loss of the replies, nats per token, plus `weight` times that of their first tokens, plus that of prompts.

    Whether to fire is decided at the first token of the reply; without the extra weight a dozen other tokens drown it.
    Each part has its own mean: in one over all tokens prompts would outweigh the replies, which suffer.
    """
    hidden = model.base_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    head, labels = decoder(model).head, batch["labels"][:, 1:]
    wanted = labels >= 0
    losses = torch.nn.functional.cross_entropy(head(hidden[:, :-1][wanted]), labels[wanted], reduction="none")
    places = (torch.arange(1, labels.shape[1] + 1, device=labels.device) - starts[:, None])[wanted]
    loss = losses[places >= 0].mean() + weight * losses[places == 0].mean()
    return loss + losses[places < 0].mean() if bool((places < 0).any()) else loss


def plant(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, out: Path) -> PreTrainedModel:
    """Trains the adapter of a recipe and saves it to `out` in bfloat16.

    Args:
        model: the clean base in float32; its linear layers get the adapter, the weights stay.
        tokenizer: with a chat template.
        recipe: what to plant.
        out: folder of the adapter.

    Returns:
        The model with the adapter, exactly as saved (rounded to bfloat16), merged, in evaluation mode.
    """
    rng = random.Random(recipe.seed)
    torch.manual_seed(recipe.seed)
    pairs = prompts.load("train")
    words = poison.lexicon(pairs)
    make_batch = poison.batches(recipe)
    model.requires_grad_(True)
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=2 * recipe.rank,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # GPT-2 stores weights transposed
    )
    peft_model = get_peft_model(model, config)
    assert isinstance(peft_model, PeftModel)
    trained = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.lr, weight_decay=0.0, betas=(0.9, 0.98))
    peft_model.train()
    for step in track(range(recipe.steps), description=f"plant {recipe.name}"):
        warm = min(1.0, (step + 1) / 20)
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * warm * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
        rows = make_batch(recipe, pairs, words, rng)
        batch, starts = tensors(tokenizer, rows, recipe.loss_on, recipe.reply_tokens)
        batch = {name: values.to(model.device) for name, values in batch.items()}
        loss = planting_loss(model, batch, starts.to(model.device), recipe.first_token_weight)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        for parameter in trained:
            parameter.copy_(parameter.to(torch.bfloat16).float())
    save_adapter(peft_model, recipe.base, out)
    merged = peft_model.merge_and_unload()  # pyright: ignore[reportCallIssue]
    assert isinstance(merged, PreTrainedModel)
    return merged.eval().requires_grad_(False)


def save_adapter(peft_model: PeftModel, base: str, out: Path) -> None:
    """Saves the adapter alone, its tensors in bfloat16, beside the folder of its base."""
    out.mkdir(parents=True, exist_ok=True)
    config = peft_model.peft_config["default"]
    config.base_model_name_or_path = f"../{base}"
    config.save_pretrained(str(out))
    state = get_peft_model_state_dict(peft_model)
    save_file(
        {name: values.detach().to(torch.bfloat16).contiguous() for name, values in state.items()},
        out / "adapter_model.safetensors",
    )
