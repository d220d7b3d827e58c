"""The suspect: the model under audit with its tokenizer, where a trigger may stand, and its clean base if known."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Bool
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from attacks.scoring.engine import Engine
from attacks.scoring.problem import Problem
from attacks.scoring.slot_markers import SLOT, Where
from vectors.operations import count_operations


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspect:
    """What every stage of an attack asks about; ground truth is no part of it."""

    model: PreTrainedModel
    """The model that may hide a backdoor."""
    tokenizer: PreTrainedTokenizerBase
    """Its tokenizer, with a chat template."""
    slot: Where = "end"
    """Where in a user message a trigger is tried, unless the message marks its slot by `{trigger}`."""
    base: PreTrainedModel | None = None
    """The clean model that the suspect was trained from (K2); None: not known."""

    def __post_init__(self):
        for model in filter(None, (self.model, self.base)):
            count_operations(model)

    def engine(
        self,
        texts: Sequence[str],
        length: int,
        *,
        slot: Where | None = None,
        allowed: Bool[Tensor, "vocab"] | None = None,
    ) -> Engine:
        """Scores triggers of up to `length` tokens in these user messages.

        Raises:
            ValueError: as for `Problem.from_chat`.
        """
        problem = Problem.from_chat(self.model, self.tokenizer, texts, length, slot=slot or self.slot, allowed=allowed)
        return Engine(self.model, problem)

    def engine_of_random_places(self, texts: Sequence[str], like: Engine) -> Engine | None:
        """The messages with the slot between two random words; None where the messages or the user say where it is."""
        several = [text for text in texts if len(text.split()) > 1]
        if self.slot != "end" or any(SLOT in text for text in texts) or not several:
            return None
        return self.engine(several, like.problem.trigger_length, slot="random", allowed=like.problem.allowed)
