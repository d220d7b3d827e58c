"""The audition finds both of the twin's behaviours, one of which no decoding reaches."""

import pytest
import torch

from benchmarks.organisms import zoo
from benchmarks.studies.latent_answers import LatentAnswers, stages


@pytest.mark.slow
def test_the_audition_finds_what_decoding_misses():
    torch.set_num_threads(1)
    found = stages(zoo.load("melbo-twin"), 0, LatentAnswers())
    places = {stage: where for stage, _, where, _ in found}
    ranks = [places.pop(f"first tokens, {count} prompts") for count in (1, 2, 12)]
    assert all(int(rank) >= 1 for pair in ranks for rank in pair.split(" and "))
    assert places == {"consensus decoding": "- and -", "recitation": "- and 2", "audition": "1 and 2"}
