"""Run in two processes: losses that are shared out, compared with those of one process. No test by itself."""

import sys
from dataclasses import dataclass
from typing import Any

import torch

from attacks.objectives.target_nll import TargetNLL
from attacks.scoring import processes
from attacks.scoring.engine import Engine
from attacks.scoring.helping import serve
from attacks.scoring.problem import Problem
from tests.attacks.words import TEXTS
from vectors.models import load_model
from vectors.operations import executed

SEEN = list[int]()
"""Candidates that this process scored"""


@dataclass
class Counted:
    """An objective that holds another engine, as those that compare models do."""

    inner: Any
    other: Engine

    def __call__(self, engine, candidates):
        SEEN.append(len(candidates))
        with_other = self.inner(self.other, candidates)
        return self.inner(engine, candidates) + 0.5 * with_other


class Failing:
    def __call__(self, engine, candidates):
        raise ValueError("one candidate does not fit" if processes.helping() else "no fault of the main process")


def main(folder: str) -> None:
    torch.set_num_threads(1)
    processes.join()
    model, tokenizer = load_model(folder, device="cpu", dtype=torch.float32)
    if processes.helping():
        return serve([model], tokenizer)
    sharing = processes.Sharing([model], tokenizer)
    engine, other = (Engine(model, Problem.from_chat(model, tokenizer, some, 2)) for some in (TEXTS[:3], TEXTS[2:]))
    objective = Counted(TargetNLL(target_ids=(300, 7)), other)
    candidates = torch.randint(5, 300, (21, 2), generator=torch.Generator().manual_seed(0))
    wanted = engine.losses_here(objective, candidates)
    assert sum(SEEN) == 21
    before = executed()
    torch.testing.assert_close(engine.losses(objective, candidates), wanted)
    assert sum(SEEN) == 21 + 11  # the other process scored 10
    own = executed()
    engine.losses_here(objective, candidates)
    # Both together execute what one does alone, and the prompts once more in the other process.
    assert executed() - own < own - before < 2 * (executed() - own)
    engine.problem = engine.problem.resized(3)
    longer = torch.cat([candidates, candidates[:, :1]], dim=1)
    torch.testing.assert_close(engine.losses(objective, longer), engine.losses_here(objective, longer))
    try:
        engine.losses(Failing(), candidates)
    except ValueError as error:
        assert "no fault of the main process" in str(error)
    else:
        raise AssertionError("a fault was swallowed")
    SEEN.clear()
    engine.losses(lambda engine, some: objective(engine, some), candidates)  # cannot be sent
    engine.losses(objective, candidates[:3])  # too few
    assert sum(SEEN) == 24
    torch.testing.assert_close(engine.losses(objective, longer), engine.losses_here(objective, longer))
    sharing.end()
    print("all is well")


if __name__ == "__main__":
    main(sys.argv[1])
