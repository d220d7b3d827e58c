"""trigger-recovery doctor [MODEL]: what a bug report should hold, and what is worth knowing before a long audit.

Each check is one line. torch and what needs it are imported inside the checks, for an installation in which they cannot
be imported is what this command has to tell of.
"""

import json
import logging
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro
from packaging.requirements import Requirement

from vectors.command_line import help_from_docstrings

PACKAGES = ("torch", "transformers", "peft", "accelerate")
"""Packages that are imported, because their versions change what works"""
GOOD, UNLOADABLE, FAULTY = 0, 2, 3
"""Exit statuses"""
CACHED = 4
"""Tokens whose keys and values are kept where the prefix cache is tried; as many follow"""
ORGANISMS = "benchmarks.organisms"
"""Package of planted models; imported by name, because packages below must not depend on those above"""
UNASKED = "word"
"""The planted model that is checked unasked"""


class Check(NamedTuple):
    """One line of the result; a note is worth knowing but keeps nothing from working."""

    name: str
    level: Literal["ok", "note", "fault"]
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
@help_from_docstrings
class Doctor:
    """Check the installation, the devices and their speed, and whether a model can be audited.

    Without MODEL, a shipped planted model is loaded and measured, which must give what is known of it. The output is
    meant for bug reports: it holds no paths and no environment variables.

    Examples:
        trigger-recovery doctor
        trigger-recovery doctor path/to/model
        trigger-recovery doctor path/to/base --adapter path/to/adapter --json
        trigger-recovery doctor --organisms word clean-control

    Exit status: 0 all is well; 2 the model cannot be loaded; 3 something else will not work.
    """

    model: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[MODEL]")] = None
    """Folder of a model in the Hugging Face layout, a GGUF file, an adapter, or a hub id; none: the installation, the
    devices and one planted model are checked."""
    adapter: str | None = None
    """Folder or hub id of a peft adapter that is merged into the model."""
    template: str | None = None
    """File of a chat template in jinja, or none to use messages as plain text; the tokenizer's own otherwise."""
    allow_pickle: bool = False
    """Reads weights from pickled files (pytorch_model.bin) too, which can run code: only for models that you trust."""
    organisms: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="[NAME|FOLDER ...]")] = None
    """Planted models that must load and give the figures of their cards: names of shipped ones, or folders with a card;
    where none is named, all whose base is shipped, which takes minutes. Without this option and without MODEL, the
    shipped one that is called word."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Prints the checks as JSON, one object each."""


def main(doctor: Doctor) -> int:
    """Runs all checks that can be run and prints them; returns the exit status."""
    checks, status = list[Check](), GOOD
    for check in run(doctor):
        check = check._replace(text=without_paths(check.text, doctor))
        checks.append(check)
        if check.level == "fault":
            status = UNLOADABLE if check.name == "model" else status or FAULTY
        if not doctor.json:
            print(f"{check.level:5}  {check.name}: {check.text}", flush=True)
    if doctor.json:
        print(json.dumps([check._asdict() for check in checks], indent=1))
    return status


def run(doctor: Doctor) -> Iterator[Check]:
    """The checks one after another; those of the model only where torch and transformers can be imported."""
    yield Check("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield from _tried("packages", _requirements)
    imported = [check for name in PACKAGES for check in _tried(name, lambda name=name: _imported(name))]
    yield from imported
    nanogcg = "installed" if find_spec("nanogcg") else "not installed; only the attack nanogcg needs it"
    yield Check("nanogcg", "ok", nanogcg)
    if any(check.level == "fault" for check in imported):
        return
    yield from _tried("devices", _devices)
    for name in _organisms(doctor):
        yield from _tried(f"organism {Path(name).name}", lambda name=name: _organism(name))
    if doctor.model is None:
        return
    from vectors.models import load_model

    logger = logging.getLogger("vectors")
    before = logger.level
    logger.setLevel(logging.ERROR)  # warnings name paths; what they say is checked below
    try:
        model, tokenizer = load_model(
            doctor.model, adapter=doctor.adapter, template=doctor.template, allow_pickle=doctor.allow_pickle
        )
    except ValueError as error:
        yield Check("model", "fault", str(error))
        return
    finally:
        logger.setLevel(before)
    for name, check in (
        ("size", _size), ("template", _template), ("prefix cache", _prefix_cache), ("typed text", _typed)
    ):  # fmt: skip
        yield from _tried(name, lambda check=check: check(model, tokenizer))


def _tried(name: str, check: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    """What a check says; whatever it fails with is a fault of one line."""
    try:
        yield from check()
    except Exception as error:
        yield Check(name, "fault", f"{type(error).__name__}: {(str(error).splitlines() or ['no reason given'])[0]}")


def _requirements() -> Iterator[Check]:
    """Whether all packages that the project declares are there, new enough."""
    try:
        own, declared = metadata.version("trigger-recovery"), metadata.requires("trigger-recovery") or []
    except metadata.PackageNotFoundError:
        yield Check("trigger-recovery", "note", "not installed but run from a checkout; pip install -e . installs it")
        return
    yield Check("trigger-recovery", "ok", own)
    for requirement in map(Requirement, declared):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            found = None
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            needed = f"{requirement.name}{requirement.specifier} is needed"
            yield Check(requirement.name, "fault", f"{found or 'not installed'}; {needed}")


def _imported(name: str) -> Iterator[Check]:
    import_module(name)
    yield Check(name, "ok", metadata.version(name))


def _devices() -> Iterator[Check]:
    """Processor and GPUs: memory, and the speed of matrix products in both formats that models are loaded in."""
    import psutil
    import torch

    from vectors.models import fast_dtype
    from vectors.speed import matrix_rate

    def speed(device: str, size: int) -> str:
        rates = (matrix_rate(size=size, dtype=dtype, device=device) for dtype in (torch.float32, torch.bfloat16))
        single, half = (f"{rate / 1e9:,.0f}" for rate in rates)
        loaded = str(fast_dtype(device)).removeprefix("torch.")
        return f"{single} GFLOP/s in float32, {half} in bfloat16 (measured); models are loaded in {loaded}"

    memory = psutil.virtual_memory()
    yield Check(
        "processor", "ok",
        f"cores: {os.cpu_count()}, threads of torch: {torch.get_num_threads()}, {memory.total / 1e9:.1f} GB of memory, "
        f"{memory.available / 1e9:.1f} GB free; {speed('cpu', 512)}",
    )  # fmt: skip
    if not torch.cuda.is_available():
        yield Check("gpu", "ok", "none that torch can use; audits run on the processor")
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name, measured = torch.cuda.get_device_name(index), speed(f"cuda:{index}", 4096)
        yield Check("gpu", "ok", f"{name}, {total / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB free; {measured}")


def _organisms(doctor: Doctor) -> tuple[str, ...]:
    """The planted models to check."""
    if doctor.organisms is None:
        return () if doctor.model else (UNASKED,)
    return doctor.organisms or import_module(f"{ORGANISMS}.zoo").ALL


def _organism(name: str) -> Iterator[Check]:
    """Whether a planted model loads and is what its card says, which tests loading, adapters and completions."""
    figures = import_module(f"{ORGANISMS}.card_check").figures(name)
    said = "; ".join(
        f"{figure.name} {figure.measured:.4g}" + ("" if figure.same else f", but {figure.card:.4g} says its card")
        for figure in figures
    )
    good = all(figure.same for figure in figures)
    yield Check(f"organism {Path(name).name}", "ok" if good else "fault", said + (", as its card says" if good else ""))


def _size(model: Any, _tokenizer: Any) -> Iterator[Check]:
    from attacks.scoring.problem import context
    from vectors.loading.placement import format_of
    from vectors.operations import count_of
    from vectors.residual import decoder, embedding

    count, tokens = sum(map(count_of, model.parameters())), context(model)
    yield Check(
        "size", "ok",
        f"{type(model).__name__}, {count / 1e6:,.1f} million parameters in {format_of(model)} on {model.device.type}, "
        f"{len(decoder(model).layers)} blocks, {len(embedding(model)):,} tokens in the vocabulary, "
        f"{'any number' if tokens == sys.maxsize else f'{tokens:,}'} in the context",
    )  # fmt: skip


def _template(_model: Any, tokenizer: Any) -> Iterator[Check]:
    from vectors.loading.tokenizers import is_plain

    if is_plain(tokenizer):
        yield Check("template", "note", "none: messages are used as plain text; give --template for a chat model")
    else:
        yield Check("template", "ok", f"works ({len(tokenizer.chat_template):,} characters)")


def _prefix_cache(model: Any, _tokenizer: Any) -> Iterator[Check]:
    """Whether a text that is continued from its kept beginning gives what the whole text gives."""
    import torch

    from attacks.scoring.shared_prefix import SharedPrefix, keeps_keys_and_values
    from vectors.residual import decoder, embedding, read

    if not keeps_keys_and_values(model):
        yield Check("prefix cache", "note", "not possible for this architecture: audits work, but take longer")
        return
    depth = len(decoder(model).layers)
    ids = torch.arange(3, 3 + 2 * CACHED, device=model.device)[None] % len(embedding(model))
    mask = torch.ones_like(ids)
    with torch.no_grad():
        whole = read(model, layers=[depth], input_ids=ids, attention_mask=mask)[depth][:, CACHED:]
        cache = SharedPrefix.run(model, ids[:, :CACHED], mask[:, :CACHED], depth).passing(1, depth)
        rest = read(model, layers=[depth], input_ids=ids[:, CACHED:], attention_mask=mask, past_key_values=cache)
    gap = float((whole - rest[depth]).abs().max() / whole.abs().max())
    if gap < 0.05:  # rounding in bfloat16
        yield Check("prefix cache", "ok", "works: what prompts begin with is run once")
    else:
        yield Check("prefix cache", "fault", f"gives other values than the whole text (off by {gap:.0%})")


def _typed(model: Any, tokenizer: Any) -> Iterator[Check]:
    """Whether a user who types what a search finds gets the same tokens."""
    from attacks.prompt_sets import BUILT_IN
    from attacks.scoring.problem import Problem, decode, encode
    from vectors.prompts import read_texts

    texts = read_texts(BUILT_IN, column="prompt")
    problem = Problem.from_chat(model, tokenizer, texts[:1], 1)  # raises where no token can be typed at all
    same = sum(encode(tokenizer, decode(tokenizer, ids)) == ids for ids in (encode(tokenizer, t) for t in texts))
    allowed = int(problem.allowed.sum())
    yield Check(
        "typed text", "ok" if same == len(texts) else "note",
        f"{same} of {len(texts)} messages come back as the same tokens; {allowed:,} of {len(problem.allowed):,} tokens "
        "may stand in a trigger",
    )  # fmt: skip


def without_paths(text: str, doctor: Doctor) -> str:
    """The text with paths cut to their last part: those that were given, and whatever else looks like one."""
    for given in filter(None, (doctor.model, doctor.adapter, doctor.template, *(doctor.organisms or ()))):
        whole = Path(given).resolve()
        for path in (str(whole), given, str(Path(given))):
            if path.strip("./\\~") not in ("", whole.name):  # a bare name tells nothing, and stands in other words
                text = text.replace(path, whole.name)
    return re.sub(r"(?<![\w<.:/])(?:[A-Za-z]:|~|\.\.?)?(?:[\\/][^\\/\s'\":;,()]+)*[\\/](?=[^\\/\s'\":;,()])", "", text)
