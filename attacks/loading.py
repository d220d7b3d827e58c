"""Loads the suspect and its clean base as a command asks for, in the main process or in one that helps it."""

import atexit
import sys
from typing import TYPE_CHECKING

from rich.console import Console
from transformers import PreTrainedModel

from attacks.clean_base import base_without_adapter, named_base, not_weakened
from attacks.scoring import processes
from attacks.scoring.helping import serve
from attacks.suspect import Suspect
from vectors.models import load_model

if TYPE_CHECKING:
    from attacks.__main__ import Request


def load(arguments: "Request", console: Console) -> Suspect:
    """The suspect and its clean base, in whatever way it is known; raises ValueError for what cannot be loaded."""
    if processes.several():
        if arguments.placement.device_map is not None:
            raise ValueError("several processes hold a model each; leave out --device-map, or start one process")
        processes.join()
    loading = {"allow_pickle": arguments.allow_pickle, **arguments.placement.loading}
    model, tokenizer = load_model(arguments.model, adapter=arguments.adapter, template=arguments.template, **loading)
    base, loading["dtype"] = None, model.dtype
    if arguments.base is not None:
        base = named_base(arguments.base, model, tokenizer, **loading)
    elif not arguments.no_base:
        base, note = base_without_adapter(arguments.model, arguments.adapter, model, tokenizer, **loading)
        if note:
            console.print(note)
    suspect = Suspect(model=model, tokenizer=tokenizer, slot=arguments.slot, base=base)
    if suspect.comparable is not None and (reason := not_weakened(model, suspect.comparable)):
        console.print(f"texts that all work are told apart without a weakened copy of the model: {reason}")
    if processes.several() and not processes.helping():
        atexit.register(processes.Sharing(_models(suspect), tokenizer).end)
    return suspect


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
