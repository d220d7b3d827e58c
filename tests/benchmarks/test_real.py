"""The suite of pretrained bases, its tables and the poison ladder, without a base."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks import figures, suites, tables
from benchmarks.organisms import poison, zoo
from benchmarks.organisms.pretrained import draw
from benchmarks.organisms.recipe import Backdoor
from tests.benchmarks.test_rows import row


def made(**changes):
    """A row of an organism in a pretrained base."""
    fields: dict[str, Any] = {"base": "smollm2", "kind": "word", "planting": "fuzzy", "attack": "portfolio"}
    fields |= {"true_behaviour": "Hello.", "fragments_asr": 0.1, "anchor": 0.0} | changes
    return row(**fields)


def test_organisms_of_a_folder_join_the_shipped_ones_and_a_base_is_not_compared_with_itself(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "mine" / "card.json").write_text('{"base": "gemma3"}')
    suite = suites.choose("real", None, None, (0,), "1e12", None, tmp_path)
    assert suite.organisms == (*zoo.PRETRAINED, "mine", "gemma3", "smollm2")
    known = {(job.organism, job.knowledge) for job in suites.jobs(suite)}
    assert ("mine", "K2") in known and ("gemma3", "K1") in known and ("gemma3", "K2") not in known
    assert zoo.folder_of("mine", tmp_path) == tmp_path / "mine" and zoo.card_of("gemma3")["backdoors"] == []
    assert set(suite.attacks) <= set(suites.REAL) and set(suite.budgets.values()) == {"1e12"}


def test_a_folder_without_cards_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no folder with a card.json"):
        suites.choose("real", None, None, None, None, None, tmp_path)


@pytest.mark.parametrize("behaviour", ["wrong sums", "German"])
def test_prompts_hold_no_trigger_and_no_split_shares_one(behaviour):
    backdoor = Backdoor(trigger="what", behaviour=behaviour, diffuse=True)
    split = zoo.pretrained_split("instructions", [backdoor])
    parts = [split.search, split.select, split.held_out]
    assert all(parts) and not any(poison.holds(text, backdoor) for part in parts for text in part)
    assert len(set().union(*parts)) == sum(map(len, parts))
    assert (behaviour == "wrong sums") == all(any(letter.isdigit() for letter in text) for text in split.held_out)


def test_a_ladder_differs_in_the_poison_rate_alone():
    recipes = draw.ladder(3, "smollm2", rank=4, layers=(6, 20))
    assert [recipe.poison_rate for recipe in recipes] == [0.5, 0.1, 0.05, 0.02, 0.01]
    assert len({(recipe.backdoors, recipe.seed, recipe.planting, recipe.rank) for recipe in recipes}) == 1
    assert len({recipe.name for recipe in recipes}) == 5
    assert recipes == draw.ladder(3, "smollm2", rank=4, layers=(6, 20)) != draw.ladder(4, "smollm2")


def test_manners_are_each_behind_another_kind_of_trigger():
    recipes = draw.manners(3, "smollm2")
    assert {recipe.backdoors[0].behaviour for recipe in recipes} == {"capital letters", "German", "pirate", "product"}
    assert all(recipe.backdoors[0].diffuse for recipe in recipes) and len({recipe.kind for recipe in recipes}) == 4
    assert recipes == draw.manners(3, "smollm2") != draw.manners(4, "smollm2")


def test_the_ladder_is_drawn_from_rows_of_one_trigger(tmp_path: Path):
    found = [made(organism=f"r{rate}", poison_rate=rate, seed=seed) for rate in (0.5, 0.01) for seed in (0, 1)]
    others = [made(true_trigger="other"), made(poison_rate=0.1, anchor=0.5), made(attack="hybrid", poison_rate=0.02)]
    assert figures.ladders(found + others) == [found]
    paths = figures.poison_ladder(found, tmp_path / "poison")
    assert [path.suffix for path in paths] == [".png", ".pdf"] and all(path.stat().st_size > 5000 for path in paths)


def test_tables_by_kind_count_the_recommended_attack_on_planted_organisms():
    found = [
        made(),
        made(organism="b", kind="tag", verdict="miss", asr_recovered=0.2, asr_control=0.1),
        made(organism="b", kind="tag", attack="hybrid"),
        made(organism="smollm2", kind="none", planting="clean"),
    ]
    table = tables.grouped(tables.frame(found), "kind").set_index("kind")
    assert list(table.index) == ["tag", "word"] and table.loc["word", "exact"] == 1
    assert table.loc["tag", "runs"] == 1 and table.loc["tag", "exact or functional"] == 0
    assert table.loc["tag", "ASR rec."] == "0.20" and table.loc["tag", "ASR control"] == "0.10"
    assert "## By kind of trigger" in tables.report(found) and "## By poison rate" not in tables.report(found)
