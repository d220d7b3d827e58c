"""Compiled blocks give the vectors of plain ones, and leave the model as it was."""

import shutil

import pytest
import torch

from vectors.methods.unsupervised import UnsupervisedVectors
from vectors.residual import decoder

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the compiler's own
def test_compiled_vectors_are_those_of_plain_blocks(llama, prompts):
    def learn(compile):
        method = UnsupervisedVectors(source_layer=1, target_layer=4, radius=0.5, count=4, steps=5, compile=compile)
        return method(llama, prompts, torch.Generator().manual_seed(0))

    plain, fused = learn(compile=False), learn(compile=True)
    torch.testing.assert_close(plain.theta, fused.theta, atol=1e-3, rtol=1e-2)
    assert all(block._compiled_call_impl is None for block in decoder(llama).layers)
