"""One thread, no hub, runtime-checked shapes: for every test."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from jaxtyping import install_import_hook

torch.set_num_threads(1)
# Shapes in signatures are checked while testing only.
install_import_hook(["vectors", "attacks"], "beartype.beartype")


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
