"""TROPT 0.1.1's GCG, run by its own code in its own environment, to be timed beside ours.

It pins another transformers, so the model is saved to a temporary folder, which `tropt_steps.py` loads there; steps are
then asked for one run at a time, so that both take turns on the machine.
"""

import copy
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from safetensors.torch import save_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

STEPS = Path(__file__).with_name("tropt_steps.py")


class Tropt:
    """A running process."""

    def __init__(self, process: "subprocess.Popen[str]"):
        self.process = process

    def seconds(self, kind: Literal["target", "cosine"], steps: int) -> float:
        """Seconds of one run of so many steps; raises RuntimeError where the process has ended."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{kind} {steps}\n")
        self.process.stdin.flush()
        return float(self.answer())

    def answer(self) -> str:
        """The next line that is one."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            # Its loggers may write to stdout too.
            if line.strip() == "ready" or line.strip().replace(".", "", 1).isdigit():
                return line.strip()
        raise RuntimeError(f"TROPT ended with status {self.process.wait()}; its errors are above")


@contextmanager
def running(
    python: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any]
) -> Iterator[Tropt]:
    """TROPT with that model, until the context ends.

    Args:
        python: interpreter of the environment that has TROPT.
        model: is saved to a temporary folder.
        tokenizer: is saved beside it, with a chat template that changes nothing, since `template` has been through one.
        settings: template (with `{trigger}`), target, start, search_width, topk, layer, direction, threads.

    Raises:
        ValueError: no such interpreter, or one without TROPT.
    """
    found = subprocess.run([python, "-c", "import tropt"], capture_output=True) if python.is_file() else None
    if found is None or found.returncode:
        raise ValueError(f"{python} has no TROPT; make an environment of its own and run: pip install tropt==0.1.1")
    with TemporaryDirectory() as folder:
        template = tokenizer.chat_template
        tokenizer.chat_template = "{{ messages[0]['content'] }}"
        try:
            # `save_pretrained` refuses what was read from GGUF, although its weights are plain ones by now.
            config = copy.deepcopy(model.config)
            vars(config).pop("quantization_config", None)
            config.save_pretrained(folder)
            save_model(model, str(Path(folder) / "model.safetensors"), metadata={"format": "pt"})
            tokenizer.save_pretrained(folder)
        finally:
            tokenizer.chat_template = template
        dtype = str(model.dtype).removeprefix("torch.")
        file = Path(folder) / "settings.json"
        file.write_text(json.dumps({**settings, "folder": folder, "dtype": dtype}))
        process = subprocess.Popen(
            [python, STEPS, file], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(settings["threads"])},
        )  # fmt: skip
        try:
            tropt = Tropt(process)
            tropt.answer()
            yield tropt
        finally:
            process.kill()
            process.wait()
