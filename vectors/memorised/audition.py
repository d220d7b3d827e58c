"""Finds memorised replies: lists candidate replies, then tests how easily a small vector elicits each; our method.

Comes in: a model and n clean prompts. Goes out: replies of a fixed number of tokens with scores, best first.
1. Candidates come from recitation (replies that are certain once begun) and from consensus decoding (replies that are
   likely on all prompts). The most certain recited replies are also tried with another token in front: a model with two
   planted replies that begin alike is trained never to go on with either, and no decoding gets past that place.
2. The test, called the audition: every candidate gets a vector of its own, a fifth of the residual's norm, and a few
   optimizer steps raise the reply's likelihood on all prompts. A reply that its vector elicits on all of them, and that
   is unlikely without a vector, ranks first: it is probably memorised.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from vectors.checks import check_positive
from vectors.memorised.answers import answer_logprob, elicit
from vectors.memorised.consensus_decoding import consensus_answers
from vectors.memorised.recitation import first_tokens, recited_answers
from vectors.methods.controls import random_directions
from vectors.prompts import Prompts
from vectors.residual import cache_source, decoder, mean_norm, read, unembed


@dataclass(frozen=True, slots=True, kw_only=True)
class Audition:
    """Finds replies that a small vector makes a model give to every prompt."""

    source_layer: int
    """number of blocks after which the vectors are added"""
    radius: float = 0.2
    """norm of the vectors, fraction of the mean residual norm at the source layer; a large norm elicits any reply"""
    tokens: int = 8
    """number of tokens per candidate reply"""
    first: int | None = None
    """number of first tokens that recitation continues, the likeliest on all prompts; None: the whole vocabulary"""
    width: int = 400
    """number of beams of consensus decoding; 0: no candidates from consensus decoding"""
    kept: int = 32
    """number of candidate replies that enter the audition from each source of candidates"""
    extended: int = 2
    """number of recited replies that are also tried with another token in front"""
    front: int = 512
    """number of likeliest first tokens that are tried in front of a recited reply"""
    steps: int = 5
    """number of optimizer steps for each candidate's vector"""
    lr: float = 0.2
    """AMSGrad step size, fraction of the norm"""
    news: float = 1 / 3
    """weight in a reply's score of its surprise (nats per token without a vector): likely ones are easy to elicit"""
    batch_size: int = 256
    """number of batch rows (candidates x prompts) at a time"""

    def __post_init__(self):
        check_positive(self, "radius", "tokens", "first", "kept", "front", "steps", "lr", "batch_size")

    def __call__(
        self,
        model: PreTrainedModel,
        prompts: Prompts,
        generator: torch.Generator,
        *,
        soft_deadline: Callable[[], bool] | None = None,
        deadline: Callable[[], bool] | None = None,
    ) -> tuple[Int[Tensor, "found tokens"], Float[Tensor, "found"]]:
        """(answers, their scores in nats per token), best first.

        The score is the log-probability under the answer's vector, plus `news` times the surprise without one, plus the
        log-probability without one of all tokens but the first: what was learned by heart is surprising only at its
        first token, while any unlikely reply stays a surprise at each of its tokens.

        Args:
            model: a causal decoder.
            prompts: n prompts; consensus decoding and the order of first tokens use all, the audition four of them,
                recitation two.
            generator: draws the direction that all vectors start from.
            soft_deadline: once it returns true, no further candidates are looked for, and those found so far are
                tested. Recitation comes first, for it finds most in its time.
            deadline: once it returns true, the test ends, and candidates that it has not reached are left out.
        """
        few, pair = (prompts.take(range(min(count, len(prompts)))) for count in (4, 2))
        late = soft_deadline or deadline or (lambda: False)
        rows = 8 * self.batch_size  # recitation keeps the caches of single tokens: more rows fit than of whole replies
        recited, _ = recited_answers(
            model, pair, tokens=self.tokens, order=first_tokens(model, prompts), count=self.first, batch_size=rows,
            deadline=late,
        )  # fmt: skip
        pool, front = [recited[: self.kept]], _likely(model, pair, self.front)
        # Different replies only: the most certain ones are often one reply, entered at each of its tokens.
        for answer in unlike(recited, self.extended):
            if not late():
                pool.append(self._extended(model, pair, answer, front, generator, late))
        if self.width and not late():
            decoded, _ = consensus_answers(model, prompts, width=self.width, tokens=self.tokens, deadline=late)
            pool.append(decoded[: self.kept])
        answers = torch.cat(pool).unique(dim=0)  # (c, tokens); sources may propose the same reply
        steered, plain, later = self._elicited(model, few, answers, generator, self.steps, deadline)
        answers = answers[: len(steered)]  # those that the deadline left time for
        score = steered - self.news * plain + later
        order = score.argsort(descending=True)
        return answers[order], score[order]

    def _extended(
        self,
        model: PreTrainedModel,
        prompts: Prompts,
        answer: Int[Tensor, "t"],
        front: Int[Tensor, "front"],
        generator: torch.Generator,
        deadline: Callable[[], bool] | None = None,
    ) -> Int[Tensor, "c t"]:
        """The answer with another token in front, for the `kept` tokens with which a vector elicits it most readily."""
        # (front, tokens): the reply moves back by one, and its last token falls off where it is too long.
        longer = torch.cat([front[:, None], answer.expand(len(front), -1)], dim=1)[:, : self.tokens]
        steered, _, _ = self._elicited(model, prompts, longer, generator, 2, deadline)
        return longer[steered.topk(min(self.kept, len(steered))).indices]

    def _elicited(
        self,
        model: PreTrainedModel,
        prompts: Prompts,
        answers: Int[Tensor, "c t"],
        generator: torch.Generator,
        steps: int,
        deadline: Callable[[], bool] | None,
    ) -> tuple[Float[Tensor, "reached"], Float[Tensor, "reached"], Float[Tensor, "reached"]]:
        """Log-probability per token of each answer: (under its own vector, without one, without one after the first).

        Where the deadline passes, only the answers of the batches that were begun before it have values.
        """
        norm = self.radius * mean_norm(cache_source(model, prompts, self.source_layer))
        # One start for all: differences between scores then come from the replies, not from the draw.
        start = norm * random_directions(1, decoder(model).d_model, generator).to(prompts.device)
        found = [(torch.zeros(0, device=prompts.device),) * 3]
        for some in answers.split(max(1, self.batch_size // len(prompts))):
            if deadline is not None and deadline():
                break
            logprob, theta = answer_logprob(model, prompts, some, self.source_layer), start.expand(len(some), -1)
            with torch.no_grad():
                plain, later = (logprob(torch.zeros_like(theta), skip) for skip in (0, 1))
            found.append((elicit(logprob, theta, steps=steps, lr=self.lr, deadline=deadline)[1], plain, later))
        steered, plain, later = (torch.cat(parts) for parts in zip(*found, strict=True))
        return steered, plain, later


@torch.no_grad()
def _likely(model: PreTrainedModel, prompts: Prompts, count: int) -> Int[Tensor, "c"]:
    """The `count` likeliest first tokens of a reply by mean log-probability over prompts, likeliest first."""
    inputs = {"input_ids": prompts.input_ids, "attention_mask": prompts.attention_mask}
    last = len(decoder(model).layers)
    hidden = read(model, layers=[last], position=slice(-1, None), **inputs)[last][:, 0]
    likely = unembed(model, hidden).float().log_softmax(-1).mean(0)
    return likely.topk(min(count, len(likely))).indices


def unlike(answers: Int[Tensor, "k t"], count: int, shared: int = 3) -> Int[Tensor, "c t"]:
    """The first `count` answers of which none shares `shared` tokens in a row with one kept before it."""
    kept: list[Tensor] = []
    seen: set[tuple[int, ...]] = set()
    for answer in answers:
        if len(kept) == count:
            break
        runs = {tuple(run) for run in answer.unfold(0, min(shared, len(answer)), 1).tolist()}
        if runs.isdisjoint(seen):
            kept.append(answer)
            seen |= runs
    return torch.stack(kept) if kept else answers[:0]
