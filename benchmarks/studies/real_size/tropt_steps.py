"""Runs TROPT's own GCG for as many steps as asked, in an environment of its own: it pins another transformers.

    other/python tropt_steps.py SETTINGS.json

Started by `tropt_peer.py`, which writes the settings and asks line by line: "target 3" on stdin runs three steps by
target likelihood, "cosine 3" by the cosine of the residual at a layer; one line of seconds is the answer. This file
imports nothing of this project, which is not installed there.
"""

import json
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import torch


def main(settings: dict[str, Any]) -> None:
    """Loads the model once, then answers."""
    torch.set_num_threads(settings["threads"])
    common, losses, lm = (import_module(f"tropt.{name}") for name in ("common", "loss.losses", "model.huggingface.lm"))
    optimizer = import_module("tropt.optimizer.gcg_optimizer").GCGOptimizer
    # Prefix cache on: this is its fastest setting.
    model = lm.LMHFModel(settings["folder"], device="cpu", dtype=settings["dtype"], use_prefix_cache=True)
    targets = {
        "target": {"target_response_strs": [settings["target"]]},
        "cosine": {"target_directions": torch.tensor([settings["direction"]], dtype=model.dtype)},
    }
    layer = settings["layer"] - 1  # its hidden states begin behind the first block
    kinds = {
        "target": losses.PrefillCELoss(),
        "cosine": losses.SteeringActivationLoss(targeted_layers=slice(layer, layer + 1), do_cosine_sim=True),
    }
    # Of one thread the processor's time, so that other work on the machine does not count; as in `speed.py`.
    clock = time.process_time if settings["threads"] == 1 else time.perf_counter
    print("ready", flush=True)
    for line in sys.stdin:
        kind, steps = line.split()
        gcg = optimizer(
            model, kinds[kind], seed=0, num_steps=int(steps), n_candidates=settings["search_width"],
            sample_topk=settings["topk"],
        )  # fmt: skip
        began = clock()
        gcg.optimize_trigger(
            templates=[settings["template"].replace("{trigger}", common.OPTIMIZED_TRIGGER_PLACEHOLDER)],
            initial_trigger=settings["start"],
            targets=common.Targets(**targets[kind]),
        )
        print(clock() - began, flush=True)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
