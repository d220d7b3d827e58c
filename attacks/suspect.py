"""The suspect: the model under audit with its tokenizer, where a trigger may stand, and its clean base if known."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from attacks.clean_base import not_weakened
from attacks.scoring.engine import Engine
from attacks.scoring.problem import Problem, encode, vocabulary_texts
from attacks.scoring.shared_prefix import keeps_keys_and_values
from attacks.scoring.slot_markers import SLOT, Where, without_slot
from vectors.operations import count_operations
from vectors.prompts import Prompts
from vectors.residual import decoder, read, unembed

OPENINGS = 4
"""Clean messages on which the model says how a reply begins"""
TOGETHER = 16
"""Messages in one forward pass"""


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
            keeps_keys_and_values(model)  # takes a forward pass, which no budget pays for
            count_operations(model)

    @property
    def comparable(self) -> PreTrainedModel | None:
        """The clean base, where its weights and residual streams can be compared with the suspect's one by one."""
        if self.base is None:
            return None
        # An adapter that stands beside quantised weights renames them, and has matrices of its own.
        shapes = [
            [weight.shape for name, weight in model.named_parameters() if "lora_" not in name]
            for model in (self.model, self.base)
        ]
        return self.base if shapes[0] == shapes[1] else None

    @property
    def weakened_by(self) -> PreTrainedModel | None:
        """The clean base, where it can be mixed with the suspect's weights to weaken a backdoor."""
        base = self.comparable
        return None if base is None or not_weakened(self.model, base) else base

    @torch.no_grad()
    def target_ids(self, behaviour: str, texts: Sequence[str]) -> tuple[int, ...]:
        """Token ids of the behaviour as the opening of a reply.

        Whether replies begin with a space is the template's and the tokenizer's affair, and a user who names the
        behaviour does not know it. The model does: a space is put before a behaviour that is given without one where
        the model's next token, mean over some clean messages, has one more likely than not.
        """
        vocabulary = vocabulary_texts(self.tokenizer)
        spaced = torch.tensor([text[:1] == " " for text in vocabulary])
        if behaviour[:1].isspace() or not spaced.any():
            return tuple(encode(self.tokenizer, behaviour))
        messages = without_slot(texts[:OPENINGS])
        chances = self._next_logits([text for text in messages if text]).softmax(-1).mean(0).cpu()[: len(spaced)]
        space = float(chances[spaced[: len(chances)]].sum()) > 0.5
        return tuple(encode(self.tokenizer, " " * space + behaviour))

    @torch.no_grad()
    def check_finite(self, texts: Sequence[str]) -> None:
        """Raises ValueError where the model gives no numbers behind some clean messages, which would void all verdicts,
        or where its context does not hold them.

        A reply of such logits is one token over and over, which shows no behaviour, so that nothing would be found.
        """
        messages = [text for text in without_slot(texts) if text.strip()]
        parts = [messages[start : start + TOGETHER] for start in range(0, len(messages), TOGETHER)]
        void = sum(int(self._next_logits(part).isnan().any(-1).sum()) for part in parts)
        if void:
            raise ValueError(
                f"the model's output is not a number (NaN) behind {void} of {len(messages)} clean prompts, in "
                f"{self.model.dtype}; use --dtype float32, or another copy of the weights"
            )

    def _next_logits(self, messages: Sequence[str]) -> Float[Tensor, "messages vocab"]:
        """Logits of the first token of the reply to each message."""
        prompts = Prompts.from_chat(self.model, self.tokenizer, messages)
        last = len(decoder(self.model).layers)
        inputs = {"input_ids": prompts.input_ids, "attention_mask": prompts.attention_mask}
        hidden = read(self.model, layers=[last], position=slice(-1, None), **inputs)[last][:, 0]
        return unembed(self.model, hidden).float()

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
