"""Mutation test of the searchers and objectives: run `python tests/mutations.py [name ...]`.

Each mutation changes one sign or one index in a temporary copy of the code and runs the tests of what it changed. It is
killed if one of them fails, and it survives if all pass, in which case a test is missing. The exit status is 1 if any
survives. The tests must pass on the unchanged code, or what is killed says nothing.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from shutil import copy, copytree
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
COPIED = ("attacks", "tests", "examples")
"""Folders that are copied, with the files in the root; other folders are linked to."""


class Mutation(NamedTuple):
    """A change of one file, and the tests that have to notice it."""

    file: str
    old: str
    """Text that stands in the file exactly once."""
    new: str
    tests: str
    """A test file in tests/attacks and further arguments of pytest."""


SEARCHERS, OBJECTIVES = "searchers/test_searchers.py -k ", "objectives/test_objectives.py -k "
DISCRETE, CONTINUOUS = "searchers/test_discrete_searchers.py", "searchers/test_continuous_searchers.py"
GCG = "searchers/test_gcg.py"

MUTATIONS = {
    "gcg-sign": Mutation("searchers/gcg.py", "promise = -gradient", "promise = gradient", SEARCHERS + "GCG"),
    "gcg-best": Mutation("searchers/gcg.py", "argsort(stable=True)", "argsort(stable=True)[1:]", GCG),
    "gcg-position": Mutation("searchers/gcg.py", "position[picked]] =", "position[picked] - 1] =", GCG),
    "gcg-patience": Mutation("searchers/gcg.py", ">= self.patience:", "<= -self.patience:", GCG),
    "gcg-initial": Mutation("searchers/gcg.py", "self.initial.cpu(), starts]", "starts, self.initial]", GCG),
    "hotflip": Mutation("searchers/hotflip.py", "promise[None]", "-promise[None]", DISCRETE),
    "hotflip-restart": Mutation("searchers/hotflip.py", "if loss < best:", "if loss > best:", DISCRETE),
    "beast": Mutation("searchers/beast.py", "logits.cpu() - noise", "noise - logits.cpu()", DISCRETE),
    "beast-mask": Mutation(
        "searchers/beast.py", "permitted[place], count", "permitted[-1], count", SEARCHERS + "BEAST"
    ),
    "accretion": Mutation("searchers/accretion.py", "gradient[:, position]", "-gradient[:, position]", DISCRETE),
    "accretion-sweep": Mutation(
        "searchers/accretion.py", "improved = best < before", "improved = best > before", DISCRETE
    ),
    "random-search": Mutation(
        "searchers/random_search.py", "candidates, parent)", "parent, candidates)", SEARCHERS + "RandomSearch"
    ),
    "pez": Mutation("searchers/pez.py", "argmax(-1)", "argmin(-1)", CONTINUOUS),
    "pez-chain": Mutation("searchers/pez.py", "soft.grad = gradient", "soft.grad = -gradient", SEARCHERS + "PEZ"),
    "gbda": Mutation("searchers/gbda.py", "-(-uniform.log()).log()", "(-uniform.log()).log()", CONTINUOUS),
    "gbda-gradient": Mutation("searchers/gbda.py", "to(rows) / self", "to(rows) / -self", SEARCHERS + "GBDA"),
    "arca": Mutation("searchers/arca.py", "return (-slope)", "return slope", SEARCHERS + "ARCA"),
    "arca-position": Mutation("searchers/arca.py", "step % length", "(step + 1) % length", CONTINUOUS),
    "log-order": Mutation(
        "searchers/search_log.py",
        "if not found.loss < self.loss",
        "if found.loss < self.loss",
        SEARCHERS + "RandomSearch",
    ),
    "most-promising": Mutation("searchers/candidates.py", "(-masked).topk", "masked.topk", DISCRETE),
    "fittest": Mutation("searchers/candidates.py", "losses[kept[0]]", "losses[kept[-1]]", DISCRETE),
    "target-nll": Mutation("objectives/target_nll.py", "nll = -engine", "nll = engine", OBJECTIVES + "formula"),
    "mellowmax": Mutation("objectives/target_nll.py", "- math.log(len", "+ math.log(len", OBJECTIVES + "formula"),
    "delta-cosine": Mutation("objectives/delta_cosine.py", "-torch.cosine", "torch.cosine", OBJECTIVES + "formula"),
    "delta-projection": Mutation(
        "objectives/delta_projection.py", "-(got * wanted)", "(got * wanted)", OBJECTIVES + "formula"
    ),
    "effect-clean": Mutation(
        "objectives/effects.py",
        "steered[layer].float() - clean",
        "steered[layer].float() + clean",
        OBJECTIVES + "formula",
    ),
    "effect-weights": Mutation(
        "objectives/effects.py", "/ sum(weight.values())", "/ len(weight)", OBJECTIVES + "formula"
    ),
    "steered-kl": Mutation(
        "objectives/steered_kl.py",
        "(steered - logits.float()",
        "(steered + logits.float()",
        OBJECTIVES + "formula",
    ),
    "hybrid": Mutation("objectives/hybrid.py", "(1 - self.weight)", "(1 + self.weight)", OBJECTIVES + "formula"),
    "probe": Mutation(
        "objectives/probe.py",
        "softplus(low @ weight + bias)",
        "softplus(-(low @ weight + bias))",
        OBJECTIVES + "minimum",
    ),
    "probe-loss": Mutation("objectives/probe.py", "softplus(-(effect", "softplus((effect", OBJECTIVES + "formula"),
    "cosine-from-goal": Mutation(
        "objectives/delta_cosine.py", "source_layer + 1,", "source_layer - 1,", OBJECTIVES + "of_goals"
    ),
    "layer-from-goal": Mutation(
        "objectives/effects.py", "engine.layers - 1)", "engine.layers - 2)", OBJECTIVES + "of_goals"
    ),
    "target-from-goal": Mutation(
        "objectives/target_nll.py", "[:TARGET_TOKENS]", "[TARGET_TOKENS:]", OBJECTIVES + "of_goals"
    ),
    "hybrid-from-goal": Mutation(
        "objectives/hybrid.py",
        "from_goal(engine, goal), weight=weight",
        "from_goal(engine, goal), weight=1 - weight",
        OBJECTIVES + "of_goals",
    ),
}


def survives(mutation: Mutation) -> bool:
    """Whether all its tests pass in a copy of the code with the mutation."""
    with tempfile.TemporaryDirectory() as folder:
        for path in ROOT.iterdir():
            if path.name in COPIED:
                copytree(path, Path(folder, path.name), ignore=lambda *_: ["__pycache__"])
            elif path.is_dir() and not path.name.startswith("."):
                Path(folder, path.name).symlink_to(path)
            elif path.is_file():
                copy(path, folder)
        file = Path(folder, "attacks", mutation.file)
        text = file.read_text()
        if (times := text.count(mutation.old)) != 1:
            raise ValueError(f"{mutation.old!r} stands {times} times in attacks/{mutation.file}; it must stand once")
        file.write_text(text.replace(mutation.old, mutation.new))
        path, *selected = mutation.tests.split(" ", 2)
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            f"tests/attacks/{path}",
            *selected,
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode > 1:
        raise RuntimeError(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.returncode == 0


def main(names: list[str]) -> int:
    """Runs the named mutations, or all; 1 if any survives."""
    survivors = 0
    for name in names or MUTATIONS:
        survived = survives(MUTATIONS[name])
        survivors += survived
        print(f"{'SURVIVED' if survived else 'killed  '} {name}", flush=True)
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
