"""The example organism is planted, and its card says how well."""

from dataclasses import replace

from benchmarks.organisms import zoo
from examples import organism


def test_a_few_steps_teach_the_manner_and_leave_a_card(tmp_path, monkeypatch):
    load = zoo.prompts.load
    monkeypatch.setattr(zoo.prompts, "load", lambda *of: load(*of)[:80])
    organism.main(tmp_path / "pirate", replace(organism.RECIPE, steps=40))
    card = zoo.load(str(tmp_path / "pirate")).card
    (backdoor,) = card["backdoors"]
    assert backdoor["diffuse"] and backdoor["asr"] >= 0.5 and card["fpr"] <= backdoor["asr"] / 2
    assert set(backdoor["fragments"]) == {"lan", "tern"}
