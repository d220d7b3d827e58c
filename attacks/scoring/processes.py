"""Several processes score the candidates of one search (`accelerate launch`): one searches, the others help it.

The main process searches, decides, prints and writes as if it were alone. The others load the same model, on a GPU
each, and wait. With many candidates to score, engine, objective and candidates are sent to them; each scores its part,
and sends losses and executed operations back. As no other process decides anything, none can end before the rest:
neither clocks nor random draws nor rounding can part them.
"""

import io
import os
import pickle
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from accelerate import PartialState
from jaxtyping import Float, Int
from torch import Tensor
from torch import distributed as dist
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vectors.operations import add_executed

if TYPE_CHECKING:
    from attacks.scoring.engine import Engine, Objective

LEAST = 4
"""Candidates per process below which sending them costs more than it saves"""
ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Signals that end a search, which keeps its best so far"""

_sharing: "WeakKeyDictionary[PreTrainedModel, Sharing]" = WeakKeyDictionary()
"""By model, what shares out its candidates; empty where there is one process"""


def several() -> bool:
    """Whether a launcher started several processes for one search."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def helping() -> bool:
    """Whether this process is one of those that help the main process."""
    return several() and os.environ.get("RANK", "0") != "0"


def join() -> None:
    """Meets the other processes, each on its own GPU where there are any."""
    # gloo, because numbers alone are exchanged, and NCCL ends processes that have waited for some minutes.
    PartialState(cpu=not torch.cuda.is_available(), backend="gloo", timeout=timedelta(days=30))


class Sharing:
    """The main process's side: sends what is to be scored, and gathers the losses."""

    def __init__(self, models: Sequence[PreTrainedModel], tokenizer: PreTrainedTokenizerBase):
        """From now on the candidates of engines on these models are shared out.

        Args:
            models: suspect and clean base; models of the same order were loaded by every process.
            tokenizer: the suspect's.
        """
        held: list[Any] = [None] * dist.get_world_size()
        dist.gather_object(len(models), held, dst=0)
        # Memory may have had room for the base in some processes only.
        self.models, self.tokenizer = list(models[: min(held)]), tokenizer
        self._busy = False
        for model in self.models:
            _sharing[model] = self

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Sharing | None":
        """What shares out the candidates of this model, if there are other processes."""
        return _sharing.get(model)

    def losses(
        self, engine: "Engine", objective: "Objective", candidates: Int[Tensor, "c trigger"]
    ) -> Float[Tensor, "c"] | None:
        """The losses of all candidates, on the processor; None where this process has to score them alone."""
        if self._busy or len(candidates) < LEAST * dist.get_world_size():
            return None
        buffer = io.BytesIO()
        try:
            _Packer(buffer, self).dump((engine, objective, candidates.cpu()))
        except (pickle.PicklingError, AttributeError, TypeError):  # an objective made of a function within a function
            return None
        found: list[Any] = [None] * dist.get_world_size()
        with self._undisturbed():
            dist.broadcast_object_list([buffer.getvalue()], src=0)
            try:
                mine: Any = engine.losses_here(objective, part(candidates)).cpu()
            except Exception as error:  # the others send their losses all the same
                mine = error
            dist.gather_object((mine, 0.0), found, dst=0)
        for result, operations in found:
            if isinstance(result, Exception):
                raise result
            add_executed(operations)
        return torch.cat([result for result, _ in found])

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Keeps signals that end the search for later: half an exchange would leave the others waiting for its end."""
        self._busy = True
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
        try:
            yield
        finally:
            self._busy = False
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def end(self) -> None:
        """Lets the other processes go."""
        dist.broadcast_object_list([None], src=0)
        dist.destroy_process_group()


def part(candidates: Tensor) -> Tensor:
    """This process's part of the candidates."""
    return candidates.tensor_split(dist.get_world_size())[dist.get_rank()]


class _Packer(pickle.Pickler):
    """Names models and the tokenizer, which every process has, for writing them; engines too."""

    def __init__(self, file: io.BytesIO, sharing: Sharing):
        super().__init__(file)
        self._sharing = sharing

    def persistent_id(self, obj: Any) -> Any:
        from attacks.scoring.engine import Engine

        if obj is self._sharing.tokenizer:
            return ("tokenizer",)
        if isinstance(obj, Engine):
            return ("engine", obj.number, obj.model, obj.problem)
        if isinstance(obj, PreTrainedModel):
            known = [index for index, model in enumerate(self._sharing.models) if model is obj]
            if not known:
                raise pickle.PicklingError("a model that only this process has")
            return ("model", known[0])
        if isinstance(obj, Tensor) and obj.device.type != "cpu":
            return ("tensor", obj.cpu())
        return None
