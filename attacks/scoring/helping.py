"""What a process does that helps another one's search: waits, scores its part of the candidates, sends the losses."""

import io
import pickle
import signal
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import distributed as dist
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from attacks.scoring.engine import Engine
from attacks.scoring.processes import ENDING, part
from vectors.operations import executed

KEPT = 8
"""Engines whose cached prompts are kept; the main process does not say which it still needs"""


def serve(models: Sequence[PreTrainedModel], tokenizer: PreTrainedTokenizerBase) -> None:
    """Scores what the main process sends until it ends; see `attacks.scoring.processes`."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)  # the main process keeps its best so far, and then ends this one
    dist.gather_object(len(models), dst=0)
    engines: OrderedDict[int, Engine] = OrderedDict()
    while True:
        box: list[Any] = [None]
        dist.broadcast_object_list(box, src=0)
        if box[0] is None:
            dist.destroy_process_group()
            return
        before = executed()
        try:
            engine, objective, candidates = _Unpacker(box[0], models, tokenizer, engines).load()
            result: Any = engine.losses_here(objective, part(candidates)).cpu()
        except Exception as error:  # the main process says it
            result = RuntimeError(f"process {dist.get_rank()}: {type(error).__name__}: {error}")
        dist.gather_object((result, executed() - before), dst=0)


class _Unpacker(pickle.Unpickler):
    """Puts in the models, tokenizer and engines of this process."""

    def __init__(
        self,
        packed: bytes,
        models: Sequence[PreTrainedModel],
        tokenizer: PreTrainedTokenizerBase,
        engines: OrderedDict[int, Engine],
    ):
        super().__init__(io.BytesIO(packed))
        self._models, self._tokenizer, self._engines = models, tokenizer, engines

    def persistent_load(self, pid: Any) -> Any:
        kind, *rest = pid
        if kind == "tokenizer":
            return self._tokenizer
        if kind == "model":
            return self._models[rest[0]]
        if kind == "tensor":
            return rest[0].to(self._models[0].device)
        number, model, problem = rest
        engine = self._engines.pop(number, None) or Engine(model, problem)
        engine.problem = problem  # the slot may have another length by now
        self._engines[number] = engine
        while len(self._engines) > KEPT:
            self._engines.popitem(last=False)
        return engine
