"""Making a model give set answers: how likely they are under vectors, and the ascent that makes them likelier."""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from vectors.generate import ends_of
from vectors.methods.sphere import ascend_on_sphere, onto_sphere
from vectors.prompts import Prompts
from vectors.residual import cache_source, decoder, run_slice, unembed
from vectors.token_logprobs import token_logprobs


def answer_logprob(
    model: PreTrainedModel, prompts: Prompts, answers: Int[Tensor, "k t"], layer: int
) -> Callable[[Float[Tensor, "k d"]], Float[Tensor, "k"]]:
    """Log-probability per token of each vector's answer, mean over prompts; nothing counts behind an end token.

    Args:
        model: a causal decoder.
        prompts: n prompts, each followed by every answer.
        answers: one for each vector.
        layer: the vectors are added after this many blocks.
    """
    source, tokens = cache_source(model, prompts.followed_by(answers[:, :-1]), layer), answers.shape[1]
    labels = answers.repeat_interleave(len(prompts), dim=0)
    counted = until_end_mask(answers, ends_of(model)).float()

    def logprob(theta: Float[Tensor, "k d"]) -> Float[Tensor, "k"]:
        moved = source.hidden + theta.repeat_interleave(len(prompts), dim=0)[:, None].to(source.hidden)
        hidden = run_slice(model, source, moved, to=len(decoder(model).layers))[:, -tokens:]
        picked = token_logprobs(unembed(model, hidden), labels)
        return (picked.unflatten(0, (-1, len(prompts))).mean(1) * counted).sum(-1) / counted.sum(-1)

    return logprob


def until_end_mask(answers: Int[Tensor, "k t"], ends: list[int]) -> Tensor:
    """Which tokens of the answers count: up to the first end token, it included."""
    end = torch.isin(answers, torch.tensor(ends, device=answers.device))
    return (end.cumsum(-1) - end.long()) == 0


def elicit(
    logprob: Callable[[Float[Tensor, "k d"]], Float[Tensor, "k"]],
    theta: Float[Tensor, "k d"],
    *,
    steps: int,
    lr: float,
    deadline: Callable[[], bool] | None = None,
    watch: Callable[[Float[Tensor, "k"]], None] | None = None,
) -> tuple[Float[Tensor, "k d"], Float[Tensor, "k"]]:
    """(vectors, log-probability of their answers) after steps of AMSGrad along the sphere on which theta begins.

    Args:
        logprob: of `answer_logprob`.
        theta: where the vectors begin, all of one norm.
        steps: optimizer steps.
        lr: step size, fraction of the norm.
        deadline: ends the ascent early once it returns true.
        watch: gets the values of every step.
    """
    norm, theta = float(theta[0].norm()), theta.clone().requires_grad_()
    ascend_on_sphere(
        lambda: logprob(theta),
        [theta],
        partial(onto_sphere, norm=norm),
        lr=lr * norm,
        steps=steps,
        deadline=deadline,
        watch=watch,
    )
    with torch.no_grad():
        return theta.detach(), logprob(theta)
