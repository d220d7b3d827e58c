"""How likely given answers are under steering vectors, and the optimisation of vectors that makes them likelier.

Every vector theta has an answer y of its own. What is maximised, on the sphere norm(theta) = R as in Mack & Turner
(2024, MELBO), is the mean over prompts x_i of log p(y | x_i, theta), in nats per token of the answer.
"""

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
) -> Callable[..., Float[Tensor, "k"]]:
    """The function from vectors to the log-probability of their answers, nats per token, mean over prompts.

    Tokens behind the first end token of an answer do not count, nor do the first `skip` tokens where the function gets
    that as a second argument. The prompts with all answers run once up to the source
    layer; each call of the function runs the later blocks only.

    Args:
        model: a causal decoder.
        prompts: n prompts, each followed by every answer.
        answers: k answers of t tokens, one for each vector.
        layer: number of blocks after which the vectors are added.
    """
    # Teacher forcing on k * n rows, ordered by answer, then prompt; an answer's last token predicts nothing.
    source, tokens = cache_source(model, prompts.followed_by(answers[:, :-1]), layer), answers.shape[1]
    labels = answers.repeat_interleave(len(prompts), dim=0)
    counted = until_end_mask(answers, ends_of(model)).float()

    def logprob(theta: Float[Tensor, "k d"], skip: int = 0) -> Float[Tensor, "k"]:
        moved = source.hidden + theta.repeat_interleave(len(prompts), dim=0)[:, None].to(source.hidden)
        hidden = run_slice(model, source, moved, to=len(decoder(model).layers))[:, -tokens:]
        picked = token_logprobs(unembed(model, hidden), labels)  # (k * n, t)
        behind = torch.cat([torch.zeros_like(counted[:, :skip]), counted[:, skip:]], dim=1)
        weights = torch.where(behind.any(-1, keepdim=True), behind, counted)  # a reply that ends at once counts whole
        return (picked.unflatten(0, (-1, len(prompts))).mean(1) * weights).sum(-1) / weights.sum(-1)

    return logprob


def until_end_mask(answers: Int[Tensor, "k t"], ends: list[int]) -> Tensor:
    """(k, t) booleans: true for each answer's tokens up to and including its first end token."""
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
    """(vectors, log-probability of their answers) after AMSGrad steps on the sphere that `theta` starts on.

    Args:
        logprob: the function that `answer_logprob` returns.
        theta: k vectors to start from, all of one norm.
        steps: number of optimizer steps.
        lr: AMSGrad step size, fraction of the norm.
        deadline: asked before every step; once it returns true the ascent ends early.
        watch: called at every step with the k values before that step.
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
