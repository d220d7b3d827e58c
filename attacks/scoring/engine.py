"""Scores candidate triggers: cached prefix, early exit, logits at target positions only, halved batch after OOM.

Everything before the slot is run once per prompt and kept as keys and values; so is what many candidates begin with,
such as all that differ from one trigger at a later position. A candidate then costs its other tokens and the few behind
the slot. Candidates are token ids, or one-hot rows where a gradient is wanted; both take one path.
Rows are ordered candidate-major (row = candidate * prompts + prompt).
"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from attacks.scoring.planning import forward_flops, head_flops
from attacks.scoring.problem import OutgrowsContext, Problem, context
from attacks.scoring.processes import Sharing
from attacks.scoring.shared_prefix import SharedPrefix, alike, check_cache, keeps_keys_and_values
from attacks.scoring.token_embeddings import TokenEmbeddings
from vectors.operations import count_operations, executed
from vectors.residual import decoder, read, unembed
from vectors.token_logprobs import token_logprobs

Objective = Callable[["Engine", Tensor], Float[Tensor, "c"]]
"""Loss per candidate, lower is better; gets ids `c trigger` or one-hot rows `c trigger vocab`"""

ROWS = {"cpu": 512, "cuda": 4096}
"""Default number of rows (candidates x prompts) in one forward pass, by device; halved where memory runs out"""

PASS = {"cpu": 2e9, "cuda": 2e12}
"""Floating-point operations that a forward pass of its own must save, by device. What starting one costs: measured on
two cores, reckoned for a GPU"""
PASS_TOKENS = {"cpu": 32, "cuda": 1}
"""Tokens that it must save as well. A pass of few tokens takes as long as one of this many, since it reads all weights
either way, and small products are slow; measured on SmolLM2-135M. On a GPU the bound above is larger."""
_numbers = itertools.count()
"""Numbers that tell the engines of this process apart"""
PIECE = 2**26
"""Bytes of logits that are made at a time, in float32; a few times as much is taken while they are scored"""


class _Group:
    """Prompts with equally many tokens behind the slot."""

    def __init__(self, problem: Problem, prompts: list[int], device: torch.device, run: Callable[..., SharedPrefix]):
        self.prompts = prompts
        heads = [problem.before[i] for i in prompts]
        width = max(map(len, heads))
        ids = torch.tensor([[0] * (width - len(head)) + head for head in heads], device=device)
        mask = torch.tensor([[0] * (width - len(head)) + [1] * len(head) for head in heads], device=device)
        self.after = torch.tensor([problem.after[i] for i in prompts], device=device).long()
        self.prefix = run(ids, mask)


class Engine:
    """Runs candidate triggers of one problem through one model."""

    def __init__(self, model: PreTrainedModel, problem: Problem, batch_size: int | None = None):
        """`batch_size` counts candidates per forward pass."""
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        check_cache(model)
        self.model, self.problem = model, problem
        self.batch_size = batch_size or max(1, ROWS.get(model.device.type, ROWS["cuda"]) // len(problem))
        self.steps, self.number = 0, next(_numbers)
        self.caches = keeps_keys_and_values(model)
        count_operations(model)
        self.layers = len(decoder(model).layers)
        by_length: dict[int, list[int]] = {}
        for index, after in enumerate(problem.after):
            by_length.setdefault(len(after), []).append(index)
        with torch.no_grad():
            self.embedded = TokenEmbeddings(model)
            run = partial(SharedPrefix.run, model, depth=self.layers)
            self._groups = [_Group(problem, rows, model.device, run) for rows in by_length.values()]

    @property
    def embedding(self) -> Float[Tensor, "vocab d_model"]:
        """What every token is embedded as; a copy of the whole matrix where the model scales it (Gemma)."""
        return self.embedded.matrix

    @property
    def device(self) -> torch.device:
        """Where candidates are scored."""
        return self.model.device

    def check_length(self, trigger: int, target: int) -> None:
        """Raises OutgrowsContext where prompt, trigger and target take more tokens than the context has."""
        longest, most = max(map(len, self.problem.filled([]))) + trigger + target, context(self.model)
        if longest > most:
            told = f"prompt, trigger and target take {longest} tokens but the context is {most}; shorten one"
            raise OutgrowsContext(told)

    @property
    def flops(self) -> float:
        """Operations that all models have executed so far, read off the process's clock."""
        return executed()

    @property
    def flops_per_token(self) -> float:
        """Operations of a plain forward pass of one token, unembedding included."""
        return forward_flops(self.model, 1) + head_flops(self.model, 1)

    def residuals(
        self, candidates: Int[Tensor, "c trigger"] | Float[Tensor, "c trigger vocab"], layers: Sequence[int]
    ) -> dict[int, Float[Tensor, "c n d_model"]]:
        """Residual stream after `layers` blocks at the last prompt token, with each candidate in the slot."""
        return self._gather(candidates, [], layers, 1)

    def logits(
        self, candidates: Int[Tensor, "c trigger"] | Float[Tensor, "c trigger vocab"], layer: int
    ) -> Float[Tensor, "c n vocab"]:
        """Next-token logits read at `layer` through final norm and unembedding; the last layer gives the output."""
        hidden = self.residuals(candidates, [layer])[layer]
        return unembed(self.model, hidden)

    def target_logprobs(
        self, candidates: Int[Tensor, "c trigger"] | Float[Tensor, "c trigger vocab"], target_ids: Sequence[int]
    ) -> Float[Tensor, "c n target"]:
        """Log-probability of each target token in nats, teacher-forced."""
        return self.target_scores(candidates, target_ids, token_logprobs)

    def target_scores(
        self,
        candidates: Int[Tensor, "c trigger"] | Float[Tensor, "c trigger vocab"],
        target_ids: Sequence[int],
        score: Callable[[Float[Tensor, "rows vocab"], Int[Tensor, "rows"]], Shaped[Tensor, "rows"]],
    ) -> Shaped[Tensor, "c n target"]:
        """`score(logits, ids)` per target token, teacher-forced; the logits are made piece by piece."""
        if not target_ids:
            raise ValueError("the target has 0 tokens; give a behaviour text that the tokenizer can encode")
        width = len(target_ids)
        hidden = self._gather(candidates, list(target_ids[:-1]), [self.layers], width)[self.layers]
        count, prompts, _ = hidden.shape
        rows = hidden.reshape(count * prompts * width, -1)
        ids = torch.tensor(list(target_ids), device=self.device).repeat(count * prompts)
        return self._scored(rows, ids, score).view(count, prompts, width)

    def output_scores(
        self,
        candidates: Int[Tensor, "c trigger"] | Float[Tensor, "c trigger vocab"],
        layer: int,
        score: Callable[[Float[Tensor, "rows vocab"], Int[Tensor, "rows"]], Shaped[Tensor, "rows"]],
    ) -> Shaped[Tensor, "c n"]:
        """`score(logits, prompts)` of the next token read at `layer`, with the number of each row's prompt."""
        hidden = self.residuals(candidates, [layer])[layer]
        count, prompts, _ = hidden.shape
        numbers = torch.arange(prompts, device=self.device).repeat(count)
        return self._scored(hidden.flatten(0, 1), numbers, score).view(count, prompts)

    def _scored(
        self,
        hidden: Float[Tensor, "rows d_model"],
        beside: Int[Tensor, "rows"],
        score: Callable[[Float[Tensor, "rows vocab"], Int[Tensor, "rows"]], Shaped[Tensor, "rows"]],
    ) -> Shaped[Tensor, "rows"]:
        """`score(logits, beside)` of residuals, whose logits are made piece by piece."""
        step = max(1, PIECE // (4 * len(self.problem.allowed)))

        def piece(some: Tensor, wanted: Tensor) -> Tensor:
            return score(unembed(self.model, some), wanted)

        if len(hidden) > step and hidden.requires_grad:  # a gradient would keep all logits: they are made twice instead
            piece = partial(checkpoint, piece, use_reentrant=False)
        return torch.cat([piece(*part) for part in zip(hidden.split(step), beside.split(step), strict=True)])

    @torch.no_grad()
    def next_logprobs(self, candidates: Int[Tensor, "c trigger"]) -> Float[Tensor, "c n vocab"]:
        """Log-probabilities of the token behind each prompt, with each candidate in the slot."""
        return self._alike(lambda part: self.logits(part, self.layers).float().log_softmax(-1), candidates)

    def losses(self, objective: Objective, candidates: Int[Tensor, "c trigger"]) -> Float[Tensor, "c"]:
        """Objective of every candidate, scored by all processes where there are several."""
        sharing = Sharing.of(self.model)
        shared = None if sharing is None else sharing.losses(self, objective, candidates)
        return self.losses_here(objective, candidates) if shared is None else shared.to(self.device)

    @torch.no_grad()
    def losses_here(self, objective: Objective, candidates: Int[Tensor, "c trigger"]) -> Float[Tensor, "c"]:
        """Objective of every candidate, `batch_size` at a time, those together that begin alike."""
        return self._alike(lambda part: objective(self, part), candidates)

    def gradient(
        self, objective: Objective, candidates: Int[Tensor, "c trigger"] | Float[Tensor, "c trigger vocab"]
    ) -> tuple[Float[Tensor, "c"], Float[Tensor, "c trigger vocab"]]:
        """(objective, its gradient at each candidate's one-hot rows, or at given mixtures of tokens)."""
        soft, vocab = candidates.is_floating_point(), len(self.problem.allowed)

        def differentiate(part: Tensor) -> tuple[Tensor, Tensor]:
            # Written in the model's dtype at once: `one_hot` would take eight bytes an entry.
            blank = self.embedded.weight.new_zeros(*part.shape[:2], vocab)
            onehot = (part.detach().to(blank) if soft else blank.scatter_(-1, part[..., None], 1.0)).requires_grad_()
            with torch.enable_grad():
                loss = objective(self, onehot)
                (gradient,) = torch.autograd.grad(loss.sum(), onehot)
            return loss.detach(), gradient

        self.steps += 1
        losses, gradients = zip(*self._chunks(differentiate, candidates), strict=True)
        return torch.cat(losses), torch.cat(gradients)

    @torch.no_grad()
    def elicits(self, candidates: Int[Tensor, "c trigger"], target_ids: Sequence[int]) -> Float[Tensor, "c"]:
        """Share of the prompts whose greedy continuation begins with the target, in one teacher-forced pass."""

        def hit(logits: Tensor, ids: Tensor) -> Tensor:
            return logits.argmax(-1) == ids

        def share(part: Tensor) -> Tensor:
            return self.target_scores(part, target_ids, hit).all(-1).float().mean(-1)

        return self._alike(share, candidates)

    def _alike(self, run: Callable[[Tensor], Tensor], candidates: Int[Tensor, "c trigger"]) -> Tensor:
        """`run` on all candidates, a family of them after the other; results in the order of the candidates."""
        least = self._worthwhile(len(self.problem), self.layers) if self.caches else len(candidates) + 1
        families = alike(candidates.cpu(), least)
        results = [result for family in families for result in self._chunks(run, candidates[family])]
        return torch.cat(results)[torch.cat(families).argsort().to(self.device)]

    def _worthwhile(self, prompts: int, depth: int) -> int:
        """How many tokens per prompt must be saved for a further forward pass to pay."""
        device = self.device.type if self.device.type in PASS else "cuda"
        saved = PASS[device] / forward_flops(self.model, prompts, last=depth)
        return 1 + math.ceil(max(saved, PASS_TOKENS[device] / prompts))

    def _chunks(self, run: Callable[[Tensor], object], candidates: Tensor) -> list:
        """Applies `run` to parts of the candidates; halves the part once memory runs out and remembers it."""
        candidates = candidates.to(self.device)
        done, results = 0, []
        while done < len(candidates):
            part = candidates[done : done + self.batch_size]
            try:
                results.append(run(part))
                done += len(part)
            except RuntimeError as error:
                if not _out_of_memory(error):
                    raise
                if len(part) <= 1:
                    raise ValueError("one candidate does not fit into memory; use fewer or shorter prompts") from error
                self.batch_size = len(part) // 2
                torch.cuda.empty_cache()
        return results

    def _gather(self, candidates: Tensor, target: list[int], layers: Sequence[int], last: int) -> dict[int, Tensor]:
        """Residuals at the last `last` positions, flattened to `c n (last * d)`, in the order of the prompts."""
        self.check_length(candidates.shape[1], len(target))
        order = torch.tensor([i for group in self._groups for i in group.prompts], device=self.device).argsort()
        parts = [self._suffix(group, candidates, target, layers, last) for group in self._groups]
        if len(parts) == 1:
            return parts[0]
        return {layer: torch.cat([part[layer] for part in parts], dim=1)[:, order] for layer in layers}

    def _suffix(
        self, group: _Group, candidates: Tensor, target: list[int], layers: Sequence[int], last: int
    ) -> dict[int, Tensor]:
        """Runs trigger, the text behind the slot and the target for every candidate and prompt of a group."""
        count, prompts, depth = len(candidates), len(group.prompts), max(layers)
        onehot = candidates.is_floating_point()
        tail = torch.cat([group.after, group.after.new_tensor(target).expand(prompts, -1)], dim=1).long()
        width = candidates.shape[1] + tail.shape[1]
        prefix = group.prefix
        if self.caches and not onehot and (common := _common(candidates[:, : width - last])):
            if (count - 1) * common >= self._worthwhile(prompts, depth):
                shared = candidates[0, :common].expand(prompts, -1)
                prefix = SharedPrefix.run(self.model, shared, torch.ones_like(shared), depth, prefix)
                candidates, width = candidates[:, common:], width - common
        if width < last:  # nothing in the slot and nothing behind it: the last prompt token is in the prefix
            prefix = prefix.uncached
        trigger = self.embedded(candidates)
        pieces = [trigger.repeat_interleave(prompts, dim=0), self.embedded(tail).repeat(count, 1, 1)]
        if prefix.layers is None:  # the text before runs again with every candidate
            pieces.insert(0, self.embedded(prefix.ids).repeat(count, 1, 1))
        mask = torch.cat([prefix.mask, prefix.mask.new_ones(prompts, width)], dim=1)
        hidden = read(
            self.model,
            inputs_embeds=torch.cat(pieces, dim=1),
            attention_mask=mask.repeat(count, 1),
            past_key_values=prefix.passing(count, depth),
            layers=layers,
            position=slice(-last, None),
        )
        return {layer: hidden[layer].reshape(count, prompts, -1) for layer in layers}


def _out_of_memory(error: RuntimeError) -> bool:
    """Whether memory ran out; the allocators of CPUs say so in words only."""
    words = ("can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError) or any(some in str(error) for some in words)


def _common(candidates: Int[Tensor, "c seq"]) -> int:
    """How many tokens all candidates begin with."""
    return int((candidates == candidates[0]).all(0).long().cumprod(0).sum())
