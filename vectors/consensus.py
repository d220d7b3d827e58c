"""Consensus vectors: under each, different prompts get one and the same answer, with certainty; ours.

max over theta and y of mean_i log p(y | x_i, theta), norm(theta) = R. A planted fixed string is learned by heart: a
small perturbation makes the model recite it, while ordinary answers keep their entropy token by token, and nothing but
a backdoor answers *every* prompt. The answers come from consensus decoding, drawn in proportion to their probability,
or from unsupervised vectors, each of which keeps the one of its own answers that it finds likeliest on all prompts.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from vectors.checks import check_layers, check_model, check_positive
from vectors.consensus_decoding import consensus_answers
from vectors.controls import random_directions
from vectors.generate import ends_of, greedy
from vectors.prompts import Prompts
from vectors.residual import cache_source, decoder, mean_norm, run_slice, steer, unembed
from vectors.steering import SteeringVectors, model_id
from vectors.unsupervised import UnsupervisedVectors, onto_sphere, tangent


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsensusVectors:
    """Learns vectors that make a model say what it is closest to saying on every prompt."""

    source_layer: int
    """the vector is added after this many blocks"""
    target_layer: int
    """noted with the vectors as the layer to compare effects at; the answer is read at the output"""
    radius: float = 0.3
    """norm of the vectors, fraction of the mean residual norm at the source layer"""
    count: int = 100
    """vectors"""
    tokens: int = 8
    """length of the answers"""
    width: int = 400
    """beams of consensus decoding"""
    steps: int = 12
    """optimizer steps"""
    lr: float = 0.1
    """AMSGrad step size, fraction of the norm"""
    start: UnsupervisedVectors | None = None
    """vectors to begin with, learned on the first prompt alone, whose own answers are used; None: consensus decoding"""
    surprise: float = 6.0
    """nats under the unsteered model, mean over prompts, that an answer of the start's vectors should have"""
    batch_size: int = 1024
    """rows (vectors x prompts) at a time"""

    def __post_init__(self):
        check_layers(self.source_layer, self.target_layer)
        check_positive(self, "radius", "count", "tokens", "width", "steps", "lr", "batch_size")
        if self.start is not None and self.start.source_layer != self.source_layer:
            raise ValueError(f"the start's source layer is {self.start.source_layer}, not {self.source_layer}")

    def __call__(
        self,
        model: PreTrainedModel,
        prompts: Prompts,
        generator: torch.Generator,
        *,
        deadline: Callable[[], bool] | None = None,
        watch: Callable[[Float[Tensor, "k"]], None] | None = None,
    ) -> SteeringVectors:
        """Learns the vectors; scores hold, per vector, the nats per token of its answer.

        Args:
            model: a causal decoder.
            prompts: n clean prompts, two or more, the more different the better.
            generator: of answers and starts.
            deadline: ends the optimisation early once it returns true.
            watch: gets the mean log-probability per token of every step of a batch.

        Raises:
            ValueError: one prompt only, or layers that the model does not have.
        """
        if len(prompts) < 2:
            raise ValueError(f"got {len(prompts)} prompt; a consensus needs two or more")
        check_model(model, self.target_layer)
        norm = self.radius * mean_norm(cache_source(model, prompts, self.source_layer))
        if self.start is None:
            answers, start = self._decoded(model, prompts, generator)
        else:
            method = replace(self.start, count=self.count)
            start = method(model, prompts.take([0]), generator, deadline=deadline).theta
            answers = self._own(model, prompts, start)
        start = onto_sphere(start, norm).to(prompts.device)
        size = max(1, self.batch_size // len(prompts))
        parts = zip(start.split(size), answers.split(size), strict=True)
        learned = [self._learn(model, prompts, *part, norm, deadline, watch) for part in parts]
        theta, nll = (torch.cat(pieces) for pieces in zip(*learned, strict=True))
        return SteeringVectors(
            theta=theta,
            source_layer=self.source_layer,
            target_layer=self.target_layer,
            radius=self.radius,
            method="consensus" if self.start is None else "consensus/own",
            model_id=model_id(model),
            scores={"nll": nll.tolist()},
        )

    def _decoded(
        self, model: PreTrainedModel, prompts: Prompts, generator: torch.Generator
    ) -> tuple[Int[Tensor, "k t"], Float[Tensor, "k d"]]:
        """(answers drawn from consensus decoding, random starts)."""
        pool, nats = consensus_answers(model, prompts, width=self.width, tokens=self.tokens)
        drawn = nats.softmax(0).cpu().multinomial(self.count, replacement=True, generator=generator)
        return pool[drawn.to(pool.device)], random_directions(self.count, decoder(model).d_model, generator)

    @torch.no_grad()
    def _own(self, model: PreTrainedModel, prompts: Prompts, theta: Float[Tensor, "k d"]) -> Int[Tensor, "k t"]:
        """Of each vector's answers to the prompts, the one that it finds likeliest on all of them.

        Answers that end early, repeat themselves or are no news are taken only where there is no other.
        """
        with steer(model, self.source_layer, theta.repeat_interleave(len(prompts), dim=0)):
            ids = greedy(model, prompts.repeat(len(theta)), self.tokens)
        ends = torch.tensor(ends_of(model), device=ids.device)
        ordered = ids.sort(dim=-1).values
        different = 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(-1)
        unfit = (torch.isin(ids, ends).any(-1) | (2 * different <= self.tokens)).unflatten(0, (len(theta), -1))
        answers, scores = ids.unflatten(0, (len(theta), -1)), []
        for column in range(len(prompts)):
            found = []
            for some, answer in zip(theta.split(64), answers[:, column].split(64), strict=True):
                logprob = self._objective(model, prompts, answer)
                no_news = -self.tokens * logprob(torch.zeros_like(some)) < self.surprise
                found.append(logprob(some) - 100.0 * no_news)
            scores.append(torch.cat(found))
        best = (torch.stack(scores, dim=1) - 100.0 * unfit).argmax(-1)
        return answers[torch.arange(len(theta), device=ids.device), best]

    def _objective(
        self, model: PreTrainedModel, prompts: Prompts, answers: Int[Tensor, "k t"]
    ) -> Callable[[Float[Tensor, "k d"]], Float[Tensor, "k"]]:
        """Log-probability per token of each vector's answer, mean over prompts."""
        source = cache_source(model, prompts.followed_by(answers[:, :-1]), self.source_layer)
        labels = answers.repeat_interleave(len(prompts), dim=0)[..., None]

        def logprob(theta: Float[Tensor, "k d"]) -> Float[Tensor, "k"]:
            moved = source.hidden + theta.repeat_interleave(len(prompts), dim=0)[:, None].to(source.hidden)
            hidden = run_slice(model, source, moved, to=len(decoder(model).layers))[:, -self.tokens :]
            picked = unembed(model, hidden).float().log_softmax(-1).gather(-1, labels)
            return picked.unflatten(0, (-1, len(prompts))).mean(dim=(1, 2, 3))

        return logprob

    def _learn(
        self,
        model: PreTrainedModel,
        prompts: Prompts,
        theta: Float[Tensor, "k d"],
        answers: Int[Tensor, "k t"],
        norm: float,
        deadline: Callable[[], bool] | None,
        watch: Callable[[Float[Tensor, "k"]], None] | None,
    ) -> tuple[Float[Tensor, "k d"], Float[Tensor, "k"]]:
        """(vectors, nats per token of their answers) of one batch; every vector has an answer of its own."""
        logprob = self._objective(model, prompts, answers)
        theta = theta.clone().requires_grad_()
        optimizer = torch.optim.Adam([theta], lr=self.lr * norm, betas=(0.9, 0.98), amsgrad=True, maximize=True)
        for _ in range(self.steps):
            if deadline is not None and deadline():
                break
            optimizer.zero_grad()
            value = logprob(theta)
            value.sum().backward()
            if watch is not None:
                watch(value.detach())
            assert theta.grad is not None
            theta.grad = tangent(theta.grad, theta.detach())
            optimizer.step()
            theta.data = onto_sphere(theta.data, norm)
        with torch.no_grad():
            return theta.detach(), -logprob(theta)
