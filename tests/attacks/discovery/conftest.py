"""An organism with a hard-planted word beside its clean base, and a comparison of both that takes seconds."""

import pytest
import torch

from attacks.discovery.contrasted_texts import ContrastedTexts
from attacks.suspect import Suspect
from benchmarks.organisms import zoo

FEW = ContrastedTexts(words=2000, longest=4, spelled=2, promising=16, likely=16)


@pytest.fixture(scope="package")
def planted_word():
    """An organism with a hard-planted word, and its clean base."""
    organism = zoo.load("other-word", dtype=torch.float32)
    base, _ = zoo.load_base("cpu", organism.card["base"], torch.float32)
    return organism, Suspect(model=organism.model, tokenizer=organism.tokenizer, base=base)
