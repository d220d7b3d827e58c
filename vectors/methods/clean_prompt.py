"""Clean-prompt vector: steered by it, a model whose user turn is still empty writes clean prompts there.

The vector maximises the log-likelihood of clean user messages, and of the token that ends them, after the text that the
chat template puts before a user message. After a proposal by the author of MELBO (Mack & Turner 2024).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vectors.checks import check_layers
from vectors.methods.controls import random_directions
from vectors.methods.likelihood import IGNORED, fit_likelihood, label_nll
from vectors.prompts import Prompts, pad_token
from vectors.residual import Source, cache_source, check_layer, decoder, mean_norm
from vectors.steering import SteeringVectors, model_id

SENTINEL = "Qx7user8content9Zk"
"""Stands for the user's message while the template round it is read; no template contains it"""


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanPromptVector:
    """Learns one vector per radius on most of the texts and keeps the one that suits the others best."""

    source_layer: int
    """number of blocks after which the vector is added"""
    target_layer: int
    """number of blocks after which effects of the vector are compared later on; learning itself reads the output"""
    radii: tuple[float, ...] = (0.1, 0.2, 0.3, 0.5, 0.8)
    """norms to try, fractions of the mean residual norm of the texts as chat prompts at the source layer"""
    steps: int = 40
    """number of optimizer steps"""
    lr: float = 0.05
    """AMSGrad step size, fraction of the norm"""
    held_out: float = 0.25
    """share of the texts, in (0, 1), that are held out to choose the radius; at least one text"""

    def __post_init__(self):
        if not self.radii or min(self.radii) <= 0:
            raise ValueError(f"radii are {self.radii}; give at least one, all more than 0")
        check_layers(self.source_layer, self.target_layer)
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out is {self.held_out}; give a fraction between 0 and 1")

    def __call__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        texts: list[str],
        generator: torch.Generator,
        *,
        deadline: Callable[[], bool] | None = None,
    ) -> SteeringVectors:
        """One vector; `scores` holds the nats per held-out token with it and without.

        `deadline` is asked before every step and ends learning once it returns true.

        The held-out texts choose among few radii, so `nll` is hardly better than on texts never seen.

        Raises:
            ValueError: fewer than two texts, one that is empty or too long, a chat template or tokenizer that does not
                keep the message apart from what stands before it, or layers that the model does not have.
        """
        check_layer(model, self.target_layer, "target layer")
        if len(texts) < 2:
            raise ValueError(f"got {len(texts)} texts; give at least two, one to learn from and one held out")
        # The unit of the radii: residuals of whole chat prompts, as for the other methods.
        chats = Prompts.from_chat(model, tokenizer, texts)
        unit = mean_norm(cache_source(model, chats, self.source_layer))
        train, held_out = self._split(model, tokenizer, texts, generator)
        radii = sorted(self.radii)
        norms = torch.tensor([radius * unit for radius in radii], device=model.device)[:, None]
        start = random_directions(len(norms), decoder(model).d_model, generator)
        losses = partial(label_nll, model, *train)
        theta, _ = fit_likelihood(losses, start, norms, steps=self.steps, lr=self.lr, deadline=deadline)
        with torch.no_grad():
            # The last row is the zero vector: the model unsteered.
            nll = label_nll(model, *held_out, torch.cat([theta, torch.zeros_like(theta[:1])])).mean(1).tolist()
        chosen = min(range(len(radii)), key=lambda row: nll[row])
        return SteeringVectors(
            theta=theta[chosen : chosen + 1],
            source_layer=self.source_layer,
            target_layer=self.target_layer,
            radius=radii[chosen],
            method="clean prompt",
            model_id=model_id(model),
            scores={"nll": [nll[chosen]], "nll_unsteered": [nll[-1]]},
        )

    def learned_from(self, texts: int) -> int:
        """How many of so many texts the vector is learned on; the others are held out."""
        return texts - min(max(1, round(self.held_out * texts)), texts - 1)

    def _split(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], generator: torch.Generator
    ) -> list[tuple[Source, Int[Tensor, "n seq"]]]:
        """(source activations, labels) of the texts to learn from and of those held out."""
        order = torch.randperm(len(texts), generator=generator).tolist()
        count = len(texts) - self.learned_from(len(texts))
        parts = []
        for chosen in (order[count:], order[:count]):
            prompts, labels = labelled_texts(tokenizer, [texts[index] for index in chosen], model.device)
            parts.append((cache_source(model, prompts, self.source_layer), labels))
        return parts


def labelled_texts(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], device: torch.device | str = "cpu"
) -> tuple[Prompts, Int[Tensor, "n seq"]]:
    """User messages behind the template's opening, and as labels the token that follows each position.

    Labelled are the tokens of the message and the first of what the template puts behind it; the last label is no
    input. Where the tokenizer merges the end of the message with that, the merged token is the last label.

    Raises:
        ValueError: the tokens of the opening change with the message, or there are none to begin a text with.
    """
    before, after = round_user(tokenizer)
    # A space at the end of the opening belongs to the first token of the message, as in " word".
    opening, document = _encode(tokenizer, before.rstrip(" ")), list[int]()
    if not opening:  # plain text begins as a document does
        document = [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if isinstance(token, int)][:1]
        opening = document
    if not opening:
        raise ValueError(
            "the chat template puts nothing before the user's message, and the tokenizer has no token for the begin or "
            "end of a text; one token at least must be there"
        )
    rows, labels = [], []
    for text in texts:
        message, whole = (document + _encode(tokenizer, before + some) for some in (text, text + after))
        # Number of tokens that the message has alone and with the template behind it: a tokenizer may merge its end.
        alike = next((i for i, (a, b) in enumerate(zip(message, whole, strict=False)) if a != b), len(message))
        ids = whole[: alike + 1]
        if ids[: len(opening)] != opening or len(ids) == len(opening):
            raise ValueError(
                f"the tokens of the chat template's opening {before!r} change when {text!r} follows; "
                "give a text that the tokenizer does not merge with it"
            )
        rows.append(ids[:-1])
        labels.append([IGNORED] * (len(opening) - 1) + ids[len(opening) :])
    prompts = Prompts.from_ids(rows, pad=pad_token(tokenizer), device=device)
    width = prompts.input_ids.shape[1]
    padded = [[IGNORED] * (width - len(row)) + row for row in labels]
    return prompts, torch.tensor(padded, device=device)


def round_user(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """The template's text before and after the user's message.

    Raises:
        ValueError: the template does not show the message, or shows it more than once.
    """
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": SENTINEL}], tokenize=False, add_generation_prompt=True
    )
    assert isinstance(chat, str)  # not tokenized yet
    parts = chat.split(SENTINEL)
    if len(parts) != 2:
        raise ValueError(f"the chat template shows the user's message {len(parts) - 1} times; it must show it once")
    return parts[0], parts[1]


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids; the template's text already holds the special tokens."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]
