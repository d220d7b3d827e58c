"""Loads the suspect and its clean base: for a program, for a command, or in a process that helps one."""

import atexit
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from transformers import PreTrainedModel

from attacks.clean_base import base_without_adapter, named_base, not_weakened
from attacks.scoring import processes
from attacks.scoring.helping import serve
from attacks.scoring.slot_markers import Where
from attacks.suspect import Suspect
from vectors.loading.adapters import base_at_hand
from vectors.loading.completeness import surprise
from vectors.loading.folders import is_adapter_only, is_local
from vectors.loading.openings import MESSAGES
from vectors.models import load_model
from vectors.prompts import Prompts

if TYPE_CHECKING:
    from attacks.__main__ import Request


def load(arguments: "Request", console: Console, dtype: torch.dtype | None = None) -> Suspect:
    """What a command asks for, shared by all processes that were started for it.

    Args:
        arguments: of the command.
        console: where it is said what stands for the clean base.
        dtype: of the weights where the command names none; None: the faster one, measured.

    Raises:
        ValueError: what cannot be loaded.
    """
    if processes.several():
        if arguments.placement.device_map is not None:
            raise ValueError("several processes hold a model each; leave out --device-map, or start one process")
        processes.join()
    loading = {"allow_pickle": arguments.allow_pickle, **arguments.placement.loading}
    loading["dtype"] = loading["dtype"] or dtype
    suspect = load_suspect(
        arguments.model,
        adapter=arguments.adapter,
        base=arguments.base,
        no_base=arguments.no_base,
        slot=arguments.slot,
        template=arguments.template,
        say=console.print,
        **loading,
    )
    if processes.several() and not processes.helping():
        atexit.register(processes.Sharing(_models(suspect), suspect.tokenizer).end)
    return suspect


def load_suspect(
    model: str | Path,
    *,
    adapter: str | Path | None = None,
    base: str | Path | None = None,
    no_base: bool = False,
    slot: Where = "end",
    template: str | None = None,
    say: Callable[[str], None] = lambda _: None,
    **loading: Any,
) -> Suspect:
    """Loads the model under audit, and its clean base in whatever way it is known.

    Args:
        model: folder in the Hugging Face layout, a GGUF file, the folder of an adapter, or a hub id; no code in it is
            run. An adapter is put on the base that its config names, or on `base` where that is not there.
        adapter: folder or hub id of a peft adapter that is merged into the model; the model without it then counts as
            the clean base.
        base: folder or hub id of the clean model that the suspect was trained from, if it is known.
        no_base: no clean base is used, not even the model without its adapter.
        slot: where in a message a trigger is tried, unless the message marks the place by {trigger}.
        template: file of a chat template, or none to use messages as plain text; the tokenizer's own otherwise.
        say: is told in a sentence what stands for the clean base, what it cannot be used for, and what looks wrong.
        loading: further arguments of `vectors.models.load_model`, such as dtype, device and allow_pickle.

    Raises:
        ValueError: one line that names what cannot be loaded and says what to do.
    """
    alone = adapter is None and is_local(model) and is_adapter_only(Path(model))
    if alone and base is not None and base_at_hand(Path(model)) is None:
        model, adapter = base, model
    suspect, tokenizer = load_model(model, adapter=adapter, template=template, **loading)
    if note := surprise(suspect, Prompts.from_chat(suspect, tokenizer, MESSAGES)):
        say(note)
    clean, loading["dtype"] = None, suspect.dtype
    if base is not None:
        clean = named_base(str(base), suspect, tokenizer, **loading)
    elif not no_base:
        named = None if adapter is None else str(adapter)
        clean, note = base_without_adapter(str(model), named, suspect, tokenizer, **loading)
        if note:
            say(note)
    loaded = Suspect(model=suspect, tokenizer=tokenizer, slot=slot, base=clean)
    if loaded.comparable is not None and (reason := not_weakened(suspect, loaded.comparable)):
        say(f"texts that all work are told apart without a weakened copy of the model: {reason}")
    return loaded


def _models(suspect: Suspect) -> list[PreTrainedModel]:
    """The models that every process of a search has."""
    return [suspect.model, *filter(None, [suspect.base])]


def help_main_process(arguments: "Request") -> int:
    """Loads the model and scores what the main process sends; what is wrong with the input, that process says."""
    try:
        suspect = load(arguments, Console(quiet=True))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    serve(_models(suspect), suspect.tokenizer)
    return 0
