"""The study that mixes what a word leaves in the residual stream with what random words leave."""

import pytest
import torch

from attacks.objectives.target_nll import TargetNLL
from attacks.scoring.engine import Engine
from attacks.scoring.problem import Problem
from benchmarks.studies.early_layers import dimmed
from tests.attacks.words import TEXTS

TARGET = (100, 101, 102)


@pytest.mark.parametrize("caches", [True, False])
def test_a_word_is_mixed_with_the_mean_of_others_of_as_many_tokens(changed, tokenizer, monkeypatch, caches):
    """All is left at strength 1, and at any strength of a word that is all there is to be mixed with."""
    monkeypatch.setattr("attacks.scoring.shared_prefix.keeps_keys_and_values", lambda _: caches)
    monkeypatch.setattr("attacks.scoring.engine.keeps_keys_and_values", lambda _: caches)
    monkeypatch.setattr(dimmed, "encoded_words", lambda _: {"a": [50], "b": [51, 52]})
    engine = Engine(changed, Problem.from_chat(changed, tokenizer, TEXTS[:3], 2))
    words = [(50,), (51, 52), (53, 52), (54,)]
    plain = [3 * float(engine.losses(TargetNLL(target_ids=TARGET), torch.tensor([ids]))[0]) for ids in words]
    assert dimmed.dimmed_nats(engine, words, TARGET, 1, 1.0, 0) == pytest.approx(plain, rel=1e-4)
    half = dimmed.dimmed_nats(engine, words, TARGET, 1, 0.5, 0)
    assert half[:2] == pytest.approx(plain[:2], rel=1e-4)
    assert all(abs(mixed - whole) > 1e-2 for mixed, whole in zip(half[2:], plain[2:], strict=True))


def test_the_study_prints_places_and_refuses_what_is_no_word(capsys):
    settings = dimmed.Settings(organism="word", relatives=4, prompts=1, layers=(1,), strengths=(0.7,), threads=1)
    dimmed.main(settings)
    printed = capsys.readouterr().out
    assert printed.count("\n") == 4 and "| which" in printed
    for name, told in (("phrase", "is no word of the dictionary"), ("clean-control", "is a clean control")):
        with pytest.raises(SystemExit):
            dimmed.main(dimmed.Settings(organism=name, threads=1))
        assert told in capsys.readouterr().err
