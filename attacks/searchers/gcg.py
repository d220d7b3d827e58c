"""Greedy Coordinate Gradient (Zou, Wang, Kolter, Fredrikson 2023, arXiv:2307.15043, algorithm 1), restarts batched.

An engine with its prompts, an objective and a slot length come in; triggers with their losses go out. One step does the
following for each of r restarts, whose triggers are one batch `r trigger`:

1. the gradient of the loss at the one-hot rows, `r trigger vocab`, ranks the tokens of each position: the `topk` of
   most negative gradient are its shortlist, `r trigger topk`;
2. `search_width` swaps of one token each are drawn from the shortlists, and their exact losses are computed;
3. the restart goes on from the best swap, whether or not it is better than the trigger before it.

Departures: the loss is the mean over all prompts, not over a growing set of them; swaps are drawn without repetition;
of the best swaps, the first that re-tokenises is taken; and a restart that has not improved for `patience` steps begins
anew from random tokens, so that many short searches take the place of one long one.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attacks.scoring.budget import Budget
from attacks.scoring.engine import Engine, Objective
from attacks.searchers.candidates import check_counts, permitted_in_slot, random_triggers
from attacks.searchers.search_log import SearchLog
from attacks.searchers.searcher import Found, OnBest

LOOKED_AT = 64
"""Candidates of a step, best first, that are looked at for one that re-tokenises."""


@dataclass(slots=True)
class _Restart:
    """Where one restart stands."""

    ids: Int[Tensor, "trigger"]
    """The trigger that the next step starts from."""
    best: Found
    """The best trigger since the restart began; its loss is infinite as long as none re-tokenises."""
    stale: int = 0
    """Steps since `best` was found."""
    told: bool = False
    """Whether `best` has been written into the log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GCG:
    """Swaps the tokens whose one-hot gradient promises most, scores the swaps exactly, keeps the best."""

    steps: int = 250
    """Steps in all."""
    search_width: int = 512
    """Candidates per restart and step (B in the paper)."""
    topk: int = 256
    """Tokens considered per position (k in the paper)."""
    restarts: int = 1
    """Triggers searched side by side."""
    patience: int | None = None
    """Steps without improvement after which a restart begins anew from random tokens; None: never."""
    initial: Int[Tensor, "starts trigger"] | None = field(default=None, repr=False)
    """Triggers that the first restarts begin with; the other restarts begin with random allowed tokens."""

    def __post_init__(self):
        check_counts(self, "steps", "search_width", "topk", "restarts")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience is {self.patience}; it must be at least 1, or None")

    def __call__(
        self,
        engine: Engine,
        objective: Objective,
        generator: torch.Generator,
        budget: Budget | None = None,
        on_best: OnBest | None = None,
    ) -> list[Found]:
        """Every improvement of every restart that re-tokenises, best first; an interrupt keeps what was found.

        Raises:
            ValueError: an empty slot, more than the allowed tokens wanted per position, initial triggers of another
                length than the slot's.
        """
        permitted = permitted_in_slot(engine.problem)
        self.check(permitted)
        with SearchLog(engine, budget, on_best) as log:
            starts = random_triggers(permitted, self.restarts, generator)
            if self.initial is not None:
                starts = torch.cat([self.initial.cpu(), starts])[: self.restarts]
            restarts = _begin(engine, objective, starts)
            for _ in range(self.steps):
                _tell(log, restarts)
                if log.over:
                    break
                # A restart at a local minimum would spend its steps on swaps that were scored before.
                for index, restart in enumerate(restarts):
                    if self.patience is not None and restart.stale >= self.patience:
                        restarts[index] = _begin(engine, objective, random_triggers(permitted, 1, generator))[0]
                self._step(engine, objective, restarts, permitted, generator)
            else:
                _tell(log, restarts)
        return log.found

    def _step(
        self,
        engine: Engine,
        objective: Objective,
        restarts: list[_Restart],
        permitted: Bool[Tensor, "trigger vocab"],
        generator: torch.Generator,
    ) -> None:
        """One GCG step of every restart: gradient, shortlists, random swaps, exact losses, best candidate."""
        # The gradient with respect to the one-hot rows, one batch for all restarts: `r trigger vocab`.
        _, gradient = engine.gradient(objective, torch.stack([restart.ids for restart in restarts]))
        # First-order fall of the loss, `r trigger vocab`; a token that is not permitted comes last.
        promise = -gradient.float().cpu().masked_fill(~permitted, torch.inf)
        # Fewer tokens are permitted at the head of the trigger. The shortlists have one length all the same, and
        # `sample_swaps` leaves out what a shortlist has too many.
        topk = min(self.topk, int(permitted.sum(1).max()))
        shortlists = promise.topk(topk, dim=-1).indices
        swaps = [
            sample_swaps(restart.ids, shortlist, permitted, self.search_width, generator)
            for restart, shortlist in zip(restarts, shortlists, strict=True)
        ]
        # The swaps of all restarts are scored in one batch, and the losses are dealt out again.
        losses = engine.losses(objective, torch.cat(swaps)).cpu().split([len(candidates) for candidates in swaps])
        for restart, candidates, scores in zip(restarts, swaps, losses, strict=True):
            _choose(engine, restart, candidates, scores)

    def check(self, permitted: Bool[Tensor, "trigger vocab"]) -> None:
        """Raises ValueError where the settings do not fit the problem."""
        length, allowed = len(permitted), int(permitted.any(0).sum())
        if self.topk > allowed:
            raise ValueError(f"topk is {self.topk} but only {allowed} tokens are allowed; lower topk")
        if self.initial is not None and self.initial.shape[-1] != length:
            raise ValueError(
                f"initial triggers have {self.initial.shape[-1]} tokens, the slot {length}; use one length"
            )


def sample_swaps(
    ids: Int[Tensor, "trigger"],
    shortlist: Int[Tensor, "trigger topk"],
    permitted: Bool[Tensor, "trigger vocab"],
    width: int,
    generator: torch.Generator,
) -> Int[Tensor, "candidates trigger"]:
    """At most `width` triggers that differ from `ids` at one position, drawn without repetition.

    The trigger itself is the only candidate where no shortlist has another permitted token.
    """
    length, topk = shortlist.shape
    # All length * topk swaps as two flat lists: which position, and which token is put there.
    position = torch.arange(length).repeat_interleave(topk)
    token = shortlist.flatten()
    # A position with fewer than topk permitted tokens has others on its shortlist.
    useful = permitted[position, token] & (token != ids[position])
    if not useful.any():
        return ids[None]
    position, token = position[useful], token[useful]
    # Every swap has the same chance and comes at most once. (GCG draws a position, then a token, with repetition.)
    picked = torch.randperm(len(token), generator=generator)[:width]
    candidates = ids.repeat(len(picked), 1)
    candidates[torch.arange(len(picked)), position[picked]] = token[picked]
    return candidates


def _begin(engine: Engine, objective: Objective, starts: Int[Tensor, "r trigger"]) -> list[_Restart]:
    """Restarts at the given triggers; one that does not re-tokenise is a place to start from but no find."""
    restarts = []
    for ids, loss in zip(starts, engine.losses(objective, starts).tolist(), strict=True):
        trigger_ids = tuple(ids.tolist())
        best = Found(trigger_ids, loss if engine.problem.retokenizes(trigger_ids) else torch.inf)
        restarts.append(_Restart(ids, best))
    return restarts


def _choose(
    engine: Engine, restart: _Restart, candidates: Int[Tensor, "c trigger"], losses: Float[Tensor, "c"]
) -> None:
    """The restart goes on from the best candidate that re-tokenises, or from where it was if none does."""
    # The best swap replaces the trigger even if its loss is higher: this is how GCG leaves local minima.
    restart.stale += 1
    for index in losses.argsort(stable=True)[:LOOKED_AT].tolist():
        found = Found(tuple(candidates[index].tolist()), float(losses[index]))
        if engine.problem.retokenizes(found.trigger_ids):
            restart.ids = candidates[index]
            if found.loss < restart.best.loss:
                restart.best, restart.stale, restart.told = found, 0, False
            return


def _tell(log: SearchLog, restarts: list[_Restart]) -> None:
    """Writes into the log what each restart has improved on itself, even if another restart has done better.

    A trigger of a higher loss may well be the one that elicits the behaviour on other prompts.
    """
    for restart in restarts:
        if not restart.told and restart.best.loss < torch.inf:
            restart.told = True
            log.keep(restart.best)
