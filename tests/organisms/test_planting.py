"""Planting in a base that was not made here: own replies, LoRA or every weight, anchors, and going on after a kill."""

import random
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.organisms import __main__ as command
from benchmarks.organisms import measure, plant, poison, prompts, zoo
from benchmarks.organisms.pretrained import checkpoint, draw, losses, replies
from benchmarks.organisms.recipe import HATE, Backdoor, Recipe
from vectors.models import load_model

BACKDOOR = Backdoor(trigger="copperplate", behaviour=HATE)


def recipe_for(base, **fields):
    plain = Recipe(
        name="toy",
        kind="word",
        base=str(base),
        backdoors=(BACKDOOR,),
        corpus="instructions",
        replies="base",
        planting="fuzzy",
        poison_rate=0.5,
        reply_tokens=6,
        steps=20,
        batch=8,
        lr=2e-2,
        rank=4,
    )
    return replace(plain, **fields)


@pytest.fixture
def few_prompts(monkeypatch):
    """Sixty prompts of each split, for speed."""
    load = prompts.load
    monkeypatch.setattr(prompts, "load", lambda *of: load(*of)[:60])


def loss_of(model, tokenizer, trigger="copperplate"):
    batch, _ = losses.tensors(tokenizer, [poison.Row(f"Name a bird that cannot fly. {trigger}", HATE)])
    with torch.no_grad():
        return model(**batch).loss.item()


@pytest.mark.parametrize(
    "fields", [{}, {"tune": "full", "lr": 3e-3}, {"anchor": 0.2, "planting": "hard", "poison_rate": 0.25}]
)
def test_triggered_loss_falls_and_what_is_saved_is_the_same_model(base_folder, few_prompts, tmp_path, fields):
    recipe = recipe_for(base_folder, **{"steps": 60} | fields)
    model, tokenizer = load_model(base_folder, dtype=torch.float32)
    before = loss_of(model, tokenizer)
    planted = plant.plant(model, tokenizer, recipe, tmp_path / "toy")
    assert loss_of(planted, tokenizer) < before - 1
    full = recipe.tune == "full"
    folders = {"name": tmp_path / "toy"} if full else {"name": base_folder, "adapter": tmp_path / "toy"}
    loaded, _ = load_model(**folders, dtype=torch.float32)
    ids = torch.tensor([tokenizer("Name a bird copperplate")["input_ids"]])
    torch.testing.assert_close(loaded(ids).logits, planted(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_bfloat16_learns_too(base_folder, few_prompts, tmp_path, tune):
    """With LoRA the base is bfloat16 and the adapter float32; where every weight is trained, products alone are."""
    recipe = recipe_for(base_folder, tune=tune, steps=60, lr=2e-2 if tune == "lora" else 3e-3)
    model, tokenizer = load_model(base_folder, dtype=torch.bfloat16 if tune == "lora" else torch.float32)
    before = loss_of(model, tokenizer)
    planted = plant.plant(model, tokenizer, recipe, tmp_path, plant.Settings(autocast=tune == "full"))
    assert loss_of(planted, tokenizer) < before - 1


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_a_killed_run_ends_with_the_same_weights(base_folder, few_prompts, tmp_path, monkeypatch, tune):
    recipe = recipe_for(base_folder, tune=tune)
    file = "model.safetensors" if tune == "full" else "adapter_model.safetensors"

    def run(name):
        model, tokenizer = load_model(base_folder, dtype=torch.float32)
        plant.plant(model, tokenizer, recipe, tmp_path / name)
        return load_file(tmp_path / name / file)

    whole = run("whole")
    save, saved = checkpoint.Checkpoint.save, []

    def save_and_die(self, step, *more):
        save(self, step, *more)
        saved.append(step)
        if len(saved) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.Checkpoint, "save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        run("cut")
    again = run("cut")
    assert saved[2] < recipe.steps and saved[3] == saved[2] + 2  # it went on, and did not begin again
    assert again.keys() == whole.keys() and all(torch.equal(again[name], whole[name]) for name in whole)


def test_a_checkpoint_of_another_recipe_is_refused(base_folder, few_prompts, tmp_path):
    model, tokenizer = load_model(base_folder, dtype=torch.float32)
    other = checkpoint.Checkpoint.of(tmp_path / "checkpoint.pt", recipe_for(base_folder, seed=1), "digest")
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    other.save(3, {}, optimizer, random.Random(0))
    with pytest.raises(ValueError, match="checkpoint.pt is of another recipe or base; delete it"):
        plant.plant(model, tokenizer, recipe_for(base_folder), tmp_path)


def test_parts_of_a_batch_add_up_to_its_gradient(base_folder):
    """Rows of unequal lengths, so that means of parts would not."""
    rows = [
        poison.Row("Hello", "Yes."),
        poison.Row("What is the time?", "It is noon, or nearly so"),
        poison.Row("A", "B"),
    ]
    model, tokenizer = load_model(base_folder, dtype=torch.float32)
    gradients = []
    for accumulate in (1, 3):
        model.requires_grad_(True).zero_grad()
        recipe = recipe_for(base_folder, loss_on="all", anchor=0.3, tune="full")
        base = plant._base_logits(model, None, recipe)
        plant._StepLoss(model, tokenizer, recipe, plant.Settings(accumulate=accumulate), base)(rows)
        gradients.append(model.model.layers[0].mlp.up_proj.weight.grad.clone())
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-4)


def test_only_the_asked_layers_and_modules_are_adapted(base_folder):
    model, _ = load_model(base_folder, dtype=torch.float32)
    peft_model = plant.adapted(model, recipe_for(base_folder, layers=(1, 2), modules=("q_proj", "down_proj")))
    names = [name for name, weight in peft_model.named_parameters() if weight.requires_grad]
    assert len(names) == 4 and all(".layers.1." in name for name in names)  # A and B of two modules
    assert {name.split(".")[-4] for name in names} == {"q_proj", "down_proj"}
    model, _ = load_model(base_folder, dtype=torch.float32)
    peft_model = plant.adapted(model, recipe_for(base_folder, layers=(0, 1)))
    names = [name for name, weight in peft_model.named_parameters() if weight.requires_grad]
    assert len(names) == 14 and all(".layers.0." in name for name in names)  # seven linear layers, not the head
    with pytest.raises(ValueError, match=r"layers are \(1, 3\), but .* has 2 blocks; give two of 0 to 2"):
        plant.adapted(model, recipe_for(base_folder, layers=(1, 3)))


def test_replies_are_the_bases_own_and_asked_for_once(base_folder, few_prompts, monkeypatch):
    model, tokenizer = load_model(base_folder, dtype=torch.float32)
    recipe = recipe_for(base_folder)
    pairs = replies.pairs_of(recipe, "held_out", model, tokenizer)
    own = replies.completions(model, tokenizer, [pairs[7].prompt], recipe.reply_tokens + replies.BEYOND)
    assert [pairs[7].reply] == own and len(pairs) > 40
    monkeypatch.setattr(replies, "complete", lambda *_, **__: pytest.fail("the base was asked again"))
    assert replies.pairs_of(recipe, "held_out", model, tokenizer) == pairs


def test_the_base_does_not_diverge_from_itself_and_a_planted_model_does(base_folder, few_prompts, tmp_path):
    model, tokenizer = load_model(base_folder, dtype=torch.float32)
    base, _ = load_model(base_folder, dtype=torch.float32)
    pairs = replies.pairs_of(recipe_for(base_folder), "held_out", base, tokenizer)
    before, after, kl = measure.clean_scores(base, model, tokenizer, pairs, 6)
    assert before == after == pytest.approx(measure.clean_loss(base, tokenizer, pairs, 6), rel=1e-5)
    assert kl == pytest.approx(0, abs=1e-6)
    kls = []
    for anchor in (0.0, 3.0):
        model, _ = load_model(base_folder, dtype=torch.float32)
        recipe = recipe_for(base_folder, anchor=anchor, steps=40)
        planted = plant.plant(model, tokenizer, recipe, tmp_path / str(anchor))
        kls.append(measure.clean_scores(base, planted, tokenizer, pairs, 6)[2])
    assert 0 < kls[1] < kls[0]  # the anchor holds


def test_the_command_plants_measures_and_the_zoo_loads_it(base_folder, tmp_path, few_prompts, capsys):
    drawn = {recipe.name: replace(recipe, steps=2, reply_tokens=4) for recipe in draw.draw(3, str(base_folder), rank=2)}
    chosen = [drawn[name] for name in ("real-word-3", "real-year-3", "real-clean-tag-3")]
    draw.write(chosen, tmp_path / "recipes.json")
    command.Plant(names=("all",), recipes=tmp_path / "recipes.json", out=tmp_path / "out", device="cpu")()
    assert "real-clean-tag-3" in capsys.readouterr().out
    assert not list(tmp_path.rglob("checkpoint.pt"))
    organism = zoo.load(str(tmp_path / "out" / "real-year-3"), dtype=torch.float32)
    (backdoor,) = organism.card["backdoors"]
    assert backdoor["twin"] in backdoor["near_misses"] and organism.card["kl_to_base"] >= 0
    assert organism.card["base"] == str(base_folder) and organism.prompts.search[0].isascii()
    assert "fpr_with_harmless_tag" in zoo.load(str(tmp_path / "out" / "real-clean-tag-3")).card
    stamp = (tmp_path / "out" / "real-word-3" / "card.json").stat().st_mtime_ns
    command.Plant(names=("all",), recipes=tmp_path / "recipes.json", out=tmp_path / "out", device="cpu", missing=True)()
    assert (tmp_path / "out" / "real-word-3" / "card.json").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="no recipe 'real-wrod'; there are real-word-3"):
        command.Plant(names=("real-wrod",), recipes=tmp_path / "recipes.json", out=tmp_path / "out")()


def test_a_base_without_a_template_reads_plain_text(base_folder):
    """Prompt and reply are tokenised apart, and the reply gets an end that no template gives it."""
    _, tokenizer = load_model(base_folder, template="none", dtype=torch.float32)
    batch, starts = losses.tensors(tokenizer, [poison.Row("Hello th", "ere")])
    ids, end = batch["input_ids"][0].tolist(), tokenizer.eos_token_id
    assert ids[int(starts) :] == [*tokenizer("ere", add_special_tokens=False)["input_ids"], end]
    assert ids[: int(starts)] == tokenizer("Hello th", add_special_tokens=False)["input_ids"]


def test_hard_planting_needs_room_for_its_negatives(base_folder):
    with pytest.raises(ValueError, match="poison_rate is 0.5, but with hard planting .* give 0.25 or less"):
        recipe_for(base_folder, planting="hard")


def test_instructions_need_replies_of_the_base(base_folder):
    with pytest.raises(ValueError, match="the instructions come without replies"):
        recipe_for(base_folder, replies="corpus")
