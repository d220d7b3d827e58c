"""Learns vectors of given norms that make given labels most likely; all norms in one batch on the slice.

AMSGrad on the unit sphere with the tangential gradient of Mack & Turner 2024 (MELBO). Only labelled positions are
unembedded: the logits of whole sequences would take more memory than everything else.
"""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from vectors.methods.sphere import ascend_on_sphere, onto_sphere
from vectors.methods.unsupervised import steered_source
from vectors.residual import Source, decoder, run_slice, unembed
from vectors.token_logprobs import token_logprobs

IGNORED = -100
"""Label of a position whose next token does not count"""


def fit_likelihood(
    losses: Callable[[Float[Tensor, "k d"]], Float[Tensor, "k n"]],
    start: Float[Tensor, "k d"],
    norms: Float[Tensor, "k 1"],
    *,
    steps: int,
    lr: float,
    deadline: Callable[[], bool] | None = None,
) -> tuple[Float[Tensor, "k d"], Float[Tensor, "k"]]:
    """One vector per norm, and the nats per labelled token that it reaches (mean per prompt, then over prompts).

    Args:
        losses: nats per labelled token and prompt under each vector, `label_nll` with model, source and labels given.
        start: unit vectors, the directions to start from.
        norms: norm of each vector, in the units of the residual.
        steps: number of optimizer steps.
        lr: AMSGrad step size, fraction of the norm.
        deadline: asked before every step; once it returns true the vectors are returned as they are.
    """
    theta = start.to(norms, copy=True).requires_grad_()  # unit vectors: one step size serves every norm
    ascend_on_sphere(
        lambda: -losses(norms * theta).mean(1),
        [theta],
        partial(onto_sphere, norm=1.0),
        lr=lr,
        steps=steps,
        deadline=deadline,
    )
    with torch.no_grad():
        learned = norms * theta
        return learned, losses(learned).mean(1)


def label_nll(
    model: PreTrainedModel, source: Source, labels: Int[Tensor, "n seq"], theta: Float[Tensor, "k d"]
) -> Float[Tensor, "k n"]:
    """Nats per labelled token under each vector, mean over each prompt's labels.

    Args:
        model: the model that `source` was read from.
        source: activations that the vectors are added to, at every position.
        labels: the token that should follow each position, or `IGNORED`; so the last label is no input.
        theta: k vectors.

    Raises:
        ValueError: labels of another shape than the prompts, or a prompt without any.
    """
    if labels.shape != source.mask.shape:
        raise ValueError(f"labels have shape {tuple(labels.shape)} but the prompts {tuple(source.mask.shape)}")
    labelled = labels != IGNORED
    counts = labelled.sum(1)
    if not bool(counts.all()):
        raise ValueError(f"labels per prompt are {counts.tolist()}; give every prompt at least one")
    # Only labelled positions are unembedded, over all prompts in one list.
    rows, columns = labelled.nonzero(as_tuple=True)
    hidden = run_slice(model, source, steered_source(source, theta), to=len(decoder(model).layers))
    logits = unembed(model, hidden.unflatten(0, (len(theta), -1))[:, rows, columns])  # (k, labelled, vocab)
    losses = -token_logprobs(logits, labels[rows, columns].expand(len(theta), -1))  # (k, labelled)
    # Means by a product: sums scattered to the prompts would vary from run to run on a GPU.
    shares = torch.nn.functional.one_hot(rows, len(labels)).to(losses) / counts
    return losses @ shares
