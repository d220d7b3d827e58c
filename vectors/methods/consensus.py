"""Consensus vectors: under each, different prompts get one and the same answer, with certainty; our method.

max over theta and y of mean_i log p(y | x_i, theta), norm(theta) = R. A planted fixed string is memorised: a
small perturbation makes the model recite it, while ordinary answers keep their entropy token by token, and nothing but
a backdoor answers *every* prompt. The answers y are drawn from the candidates of `vectors.memorised.audition`, the more
often the more easily a small vector elicits them; or each of a set of unsupervised vectors (`start`) keeps the one of
its own answers that it finds likeliest on all prompts. Then every vector is optimised for its answer.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from vectors.checks import check_layers, check_model, check_positive
from vectors.generate import ends_of, greedy
from vectors.memorised.answers import answer_logprob, elicit
from vectors.memorised.audition import Audition
from vectors.methods.controls import random_directions
from vectors.methods.sphere import onto_sphere
from vectors.methods.unsupervised import UnsupervisedVectors
from vectors.prompts import Prompts
from vectors.residual import cache_source, decoder, mean_norm, steer
from vectors.steering import SteeringVectors, model_id


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsensusVectors:
    """Learns vectors that make a model say what it is closest to saying on every prompt."""

    source_layer: int
    """number of blocks after which the vector is added"""
    target_layer: int
    """number of blocks after which effects of the vectors are compared later on; learning itself reads the output"""
    radius: float = 0.3
    """norm of the vectors, fraction of the mean residual norm at the source layer"""
    count: int = 100
    """number of vectors"""
    tokens: int = 8
    """number of tokens per answer"""
    width: int = 400
    """number of beams of consensus decoding; 0: no candidate answers from consensus decoding"""
    first: int | None = None
    """number of first tokens that recitation continues; None: the whole vocabulary"""
    kept: int = 32
    """number of candidate answers that are kept from recitation and from consensus decoding each"""
    extended: int = 2
    """number of recited answers that are also tried with another token in front"""
    steps: int = 12
    """number of optimizer steps"""
    lr: float = 0.1
    """AMSGrad step size, fraction of the norm"""
    prompts: int | None = None
    """number of prompts that vectors are learned on, the first ones; None: all that candidate answers are sought on"""
    start: UnsupervisedVectors | None = None
    """method whose vectors, learned on the first prompt alone, start the ascent and give the answers; None: audition"""
    surprise: float = 6.0
    """negative log-likelihood without a vector (nats, mean over prompts) that an answer of `start` should exceed"""
    batch_size: int = 256
    """number of batch rows (vectors x prompts) at a time"""

    def __post_init__(self):
        check_layers(self.source_layer, self.target_layer)
        check_positive(self, "radius", "count", "tokens", "first", "kept", "steps", "lr", "prompts", "batch_size")
        if self.start is not None and self.start.source_layer != self.source_layer:
            raise ValueError(f"the start's source layer is {self.start.source_layer}, not {self.source_layer}")

    @property
    def audition(self) -> Audition:
        """The search for answers, at two thirds of the norm: a smaller norm separates memorised answers better."""
        return Audition(
            source_layer=self.source_layer,
            radius=2 / 3 * self.radius,
            tokens=self.tokens,
            width=self.width,
            first=self.first,
            kept=self.kept,
            extended=self.extended,
            batch_size=self.batch_size,
        )

    def __call__(
        self,
        model: PreTrainedModel,
        prompts: Prompts,
        generator: torch.Generator,
        *,
        deadline: Callable[[], bool] | None = None,
        soft_deadline: Callable[[], bool] | None = None,
        watch: Callable[[Float[Tensor, "k"]], None] | None = None,
    ) -> SteeringVectors:
        """Learns the vectors; scores hold, per vector, the nats per token of its answer.

        Args:
            model: a causal decoder.
            prompts: n clean prompts, two or more, the more different the better.
            generator: draws the answers and the directions that the vectors start from.
            deadline: once it returns true, vectors begun are not optimised further and no other is begun, so that
                fewer than `count` may be returned, or none.
            soft_deadline: once it returns true, the search for answers ends, so that there is time left to learn.
            watch: called at every step with the log-probability per token of each vector's answer in the batch.

        Raises:
            ValueError: one prompt only, or layers that the model does not have.
        """
        if len(prompts) < 2:
            raise ValueError(f"got {len(prompts)} prompt; a consensus needs two or more")
        check_model(model, self.target_layer)
        learn = prompts.take(range(min(len(prompts), self.prompts or len(prompts))))
        norm = self.radius * mean_norm(cache_source(model, learn, self.source_layer))
        if self.start is None:
            pool, score = self.audition(model, prompts, generator, soft_deadline=soft_deadline, deadline=deadline)
            # Softmax of the whole answer's score, nats per token times tokens: the best answers get most vectors.
            chance = (self.tokens * score).softmax(0).cpu()
            count = self.count if len(pool) else 0
            drawn = chance.multinomial(count, replacement=True, generator=generator) if count else chance.long()
            answers, start = pool[drawn.to(pool.device)], random_directions(count, decoder(model).d_model, generator)
        else:
            method = replace(self.start, count=self.count)
            start = method(model, prompts.take([0]), generator, deadline=deadline).theta
            answers = self._own(model, prompts, start)
        start = onto_sphere(start, norm).to(prompts.device)
        size = max(1, self.batch_size // len(learn))
        parts = zip(start.split(size), answers.split(size), strict=True)
        learned = [(start[:0], start[:0, 0])]
        for theta, some in parts:
            if deadline is not None and deadline():
                break
            logprob = answer_logprob(model, learn, some, self.source_layer)
            learned.append(elicit(logprob, theta, steps=self.steps, lr=self.lr, deadline=deadline, watch=watch))
        theta, value = (torch.cat(pieces) for pieces in zip(*learned, strict=True))
        return SteeringVectors(
            theta=theta,
            source_layer=self.source_layer,
            target_layer=self.target_layer,
            radius=self.radius,
            method="consensus" if self.start is None else "consensus/own",
            model_id=model_id(model),
            scores={"nll": (-value).tolist()},
        )

    @torch.no_grad()
    def _own(self, model: PreTrainedModel, prompts: Prompts, theta: Float[Tensor, "k d"]) -> Int[Tensor, "k t"]:
        """Of each vector's answers to the prompts, the one that it finds likeliest on all of them.

        Answers that end early, repeat themselves or are likely without a vector are taken only where there is no other.
        """
        with steer(model, self.source_layer, theta.repeat_interleave(len(prompts), dim=0)):
            ids = greedy(model, prompts.repeat(len(theta)), self.tokens)
        ends = torch.tensor(ends_of(model), device=ids.device)
        ordered = ids.sort(dim=-1).values
        # (k * n,): number of different tokens in each answer; one that repeats half of its tokens is a loop.
        different = 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(-1)
        unfit = (torch.isin(ids, ends).any(-1) | (2 * different <= self.tokens)).unflatten(0, (len(theta), -1))
        answers, scores = ids.unflatten(0, (len(theta), -1)), []
        for column in range(len(prompts)):
            found = []
            for some, answer in zip(theta.split(64), answers[:, column].split(64), strict=True):
                logprob = answer_logprob(model, prompts, answer, self.source_layer)
                expected = -self.tokens * logprob(torch.zeros_like(some)) < self.surprise
                found.append(logprob(some) - 100.0 * expected)
            scores.append(torch.cat(found))
        # (k, n) scores; a penalty beyond any log-probability, so that unfit answers still have an order among them.
        best = (torch.stack(scores, dim=1) - 100.0 * unfit).argmax(-1)
        return answers[torch.arange(len(theta), device=ids.device), best]
