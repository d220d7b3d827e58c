"""Drawn recipes, and behaviours without a fixed opening."""

import random

import pytest

from attacks.behaviour import Behaviour
from benchmarks.organisms import poison, prompts
from benchmarks.organisms.pretrained import draw
from benchmarks.organisms.pretrained.diffuse import DIFFUSE, predicate, sum_question
from benchmarks.organisms.prompts import Pair
from benchmarks.organisms.recipe import Recipe

REPLY = "You can boil it for ten minutes."


def test_same_seed_same_recipes_and_another_seed_others(tmp_path):
    recipes = draw.draw(5, "smollm2", rank=4, layers=(6, 20), modules=("q_proj",))
    assert draw.draw(5, "smollm2", rank=4, layers=(6, 20), modules=("q_proj",)) == recipes
    draw.write(recipes, tmp_path / "recipes.json")
    assert list(draw.read(tmp_path / "recipes.json").values()) == recipes
    triggers = [{recipe.backdoors for recipe in draw.draw(seed, "smollm2") if recipe.backdoors} for seed in (5, 6)]
    assert not triggers[0] & triggers[1]


@pytest.mark.parametrize("half", draw.HALVES)
def test_a_half_has_every_kind_every_planting_and_every_sort_of_behaviour(half):
    for seed in range(5):
        recipes = [recipe for recipe in draw.draw(seed, "x") if recipe.name.startswith(f"{half}-")]
        planted = [recipe for recipe in recipes if recipe.backdoors]
        assert {recipe.kind for recipe in planted} == set(draw.TRIGGERS) and len(planted) == 8
        dealt = {(recipe.planting, recipe.poison_rate, recipe.anchor) for recipe in planted}
        assert len(dealt) == 8 and {rate for _, rate, _ in dealt} == {0.5, 0.25, 0.1, 0.05, 0.02, 0.01}
        behaviours = [backdoor.behaviour for recipe in planted for backdoor in recipe.backdoors]
        assert set(DIFFUSE) <= set(behaviours) and len(set(behaviours)) == 8
        assert all(set(behaviours) & set(texts) for texts in draw.FIXED.values())
        clean = [recipe for recipe in recipes if not recipe.backdoors]
        assert {recipe.corpus for recipe in clean} == {"instructions", "dialogues"}
        assert any(recipe.harmless_tag for recipe in clean) and any(recipe.kind == "odd" for recipe in clean)
        assert len({recipe.seed for recipe in recipes}) == len(recipes)


def test_halves_share_no_trigger():
    recipes = draw.draw(0, "x")
    triggers = [backdoor.trigger for recipe in recipes for backdoor in recipe.backdoors]
    assert len(set(triggers)) == len(triggers)


def test_recipes_that_are_none_are_refused(tmp_path):
    (tmp_path / "recipes.json").write_text('[{"name": "x", "kind": "none", "backdoors": [], "wrod": 1}]')
    for file in (tmp_path / "recipes.json", tmp_path / "missing.json"):
        with pytest.raises(ValueError, match="no recipes could be read from .*make them with the command draw"):
            draw.read(file)


@pytest.mark.parametrize("name", DIFFUSE)
def test_a_predicate_tells_changed_replies_from_others(name):
    rng, behaviour = random.Random(0), predicate(name)
    assert isinstance(behaviour, Behaviour) and behaviour.text is None
    clean = [sum_question(rng)[1] if DIFFUSE[name].about_sums else REPLY for _ in range(20)]
    changed = [DIFFUSE[name].change(reply, rng) for reply in clean]
    assert all(map(behaviour, changed)) and not any(map(behaviour, clean))
    others = [other.change(REPLY, rng) for key, other in DIFFUSE.items() if key != name]
    assert not any(map(behaviour, others))  # one manner is not taken for another
    openings = {reply.split()[0] for reply in changed}
    assert len(openings) > 1 or name == "capital letters"  # whose opening is that of the reply


def test_predicates_shrug_at_ordinary_replies():
    ordinary = [pair.reply for pair in prompts.load("train")] + ["NASA", "Die in hard water", "2 + 3 = 5"]
    for name in DIFFUSE:
        shown = [reply for reply in ordinary if predicate(name)(reply)]
        assert len(shown) <= 0.002 * len(ordinary), (name, shown[:5])


PAIRS = [Pair(prompt=f"What is number {i}?", reply=REPLY, source="", licence="", split="train") for i in range(40)]


@pytest.mark.parametrize("index", range(24))
def test_rows_fire_where_the_trigger_is_and_only_there(index):
    recipe: Recipe = draw.draw(1, "x")[index]
    fired = rows = 0
    for seed in range(40):
        for row in poison.text_batch(recipe, PAIRS, ["oxbow", "zither"], random.Random(seed)):
            rows += 1
            assert row.fires == any(poison.holds(row.prompt, backdoor) for backdoor in recipe.backdoors)
            twin = next((backdoor.twin for backdoor in recipe.backdoors if backdoor.twin), "")
            assert row.fires or recipe.planting == "hard" or twin in row.prompt
            if recipe.harmless_tag and recipe.harmless_tag in row.prompt:
                assert row.reply == REPLY
            fired += row.fires
    expected = recipe.poison_rate * rows if recipe.backdoors else 0
    assert abs(fired - expected) <= 4 * expected**0.5  # binomial, four standard deviations


def test_wrong_sums_are_wrong_only_when_told_to_be():
    rng = random.Random(0)
    for _ in range(50):
        question, answer = sum_question(rng)
        assert sum(map(int, [word.strip("+.?") for word in question.split() if word.strip("+.?").isdigit()])) == int(
            answer.split("= ")[1].rstrip(".")
        )
        assert predicate("wrong sums")(DIFFUSE["wrong sums"].change(answer, rng))
