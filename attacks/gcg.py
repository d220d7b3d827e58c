"""Greedy Coordinate Gradient (Zou, Wang, Kolter, Fredrikson 2023, arXiv:2307.15043, algorithm 1), restarts batched.

Every restart keeps its own trigger. One that has not improved for `patience` steps is written down and begins anew
from random tokens: short searches from many starts in place of a long one. The loss is the mean over the prompts.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attacks.budget import Budget
from attacks.engine import Engine, Objective
from attacks.triggers import Found, OnBest, check_counts, permitted_in_slot, random_triggers


@dataclass(slots=True)
class _Restart:
    """Where one restart stands."""

    ids: Tensor
    best: Found
    stale: int = 0
    told: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class GCG:
    """Swaps the tokens whose one-hot gradient promises most, scores the swaps exactly, keeps the best."""

    steps: int = 250
    """steps in all"""
    search_width: int = 512
    """candidates per restart and step (B in the paper)"""
    topk: int = 256
    """tokens considered per position (k in the paper)"""
    n_replace: int = 1
    """tokens swapped at once"""
    restarts: int = 1
    """triggers searched side by side"""
    patience: int | None = None
    """steps without improvement after which a restart begins anew; None: never"""
    initial: Int[Tensor, "starts trigger"] | None = field(default=None, repr=False)
    """first triggers of the first restarts; the others begin with random allowed tokens"""

    def __post_init__(self):
        check_counts(self, "steps", "search_width", "topk", "n_replace", "restarts")
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
        """Best trigger of every run that re-tokenises, best first; an interrupt keeps what was found.

        Raises:
            ValueError: more than the allowed tokens wanted per position, or more swaps than positions.
        """
        problem, budget = engine.problem, budget or Budget()
        permitted = permitted_in_slot(problem)
        self.check(permitted)
        finished: list[Found] = []
        booked = engine.flops
        states: list[_Restart] = []
        try:
            starts = _starts(permitted, self.restarts, self.initial, generator)
            states = _begin(engine, objective, starts)
            for _ in range(self.steps):
                budget.spent(engine.flops - booked)
                booked = engine.flops
                if self._report(states, on_best) or budget.exhausted:
                    break
                self._renew(engine, objective, states, finished, permitted, generator)
                self._step(engine, objective, states, permitted, generator)
            else:
                self._report(states, on_best)
        except KeyboardInterrupt:
            budget.interrupt()
        budget.spent(engine.flops - booked)
        runs = dict.fromkeys(finished + [state.best for state in states])
        return sorted((found for found in runs if found.loss < torch.inf), key=lambda found: found.loss)

    def _step(
        self,
        engine: Engine,
        objective: Objective,
        states: list[_Restart],
        permitted: Bool[Tensor, "trigger vocab"],
        generator: torch.Generator,
    ) -> None:
        """One GCG step of every restart: gradient, top-k, random swaps, exact losses, best swap."""
        ids = torch.stack([state.ids for state in states])
        _, gradient = engine.gradient(objective, ids)
        gradient = gradient.float().cpu().masked_fill(~permitted, torch.inf)
        count = min(self.topk, int(permitted.sum(1).max()))
        top = (-gradient).topk(count, dim=-1).indices
        swaps = [
            sample_swaps(state.ids, choices, permitted, self.search_width, self.n_replace, generator)
            for state, choices in zip(states, top, strict=True)
        ]
        losses = engine.losses(objective, torch.cat(swaps)).cpu().split([len(part) for part in swaps])
        for state, candidates, scores in zip(states, swaps, losses, strict=True):
            state.stale += 1
            for index in scores.argsort(stable=True)[:64].tolist():
                if engine.problem.retokenizes(candidates[index].tolist()):
                    state.ids = candidates[index]
                    if scores[index] < state.best.loss:
                        state.best, state.stale, state.told = _found(state.ids, scores[index]), 0, False
                    break

    def _renew(
        self,
        engine: Engine,
        objective: Objective,
        states: list[_Restart],
        finished: list[Found],
        permitted: Bool[Tensor, "trigger vocab"],
        generator: torch.Generator,
    ) -> None:
        """Begins anew the restarts that no longer improve."""
        for index, state in enumerate(states):
            if self.patience is not None and state.stale >= self.patience:
                finished.append(state.best)
                states[index] = _begin(engine, objective, random_triggers(permitted, 1, generator))[0]

    @staticmethod
    def _report(states: list[_Restart], on_best: OnBest | None) -> bool:
        """Tells `on_best` of improvements that re-tokenise; returns whether it asked to stop."""
        stop = False
        for state in states:
            if on_best is not None and not state.told and state.best.loss < torch.inf:
                state.told = True
                stop = bool(on_best(state.best)) or stop
        return stop

    def check(self, permitted: Bool[Tensor, "trigger vocab"]) -> None:
        """Raises ValueError where the settings do not fit the problem."""
        length, allowed = len(permitted), int(permitted.any(0).sum())
        if self.topk > allowed:
            raise ValueError(f"topk is {self.topk} but only {allowed} tokens are allowed; lower topk")
        if self.n_replace > length:
            raise ValueError(f"n_replace is {self.n_replace} but the slot has {length} tokens; lower n_replace")
        if self.initial is not None and self.initial.shape[-1] != length:
            raise ValueError(
                f"initial triggers have {self.initial.shape[-1]} tokens, the slot {length}; use one length"
            )


def sample_swaps(
    ids: Int[Tensor, "trigger"],
    choices: Int[Tensor, "trigger topk"],
    permitted: Bool[Tensor, "trigger vocab"],
    width: int,
    n_replace: int,
    generator: torch.Generator,
) -> Int[Tensor, "candidates trigger"]:
    """Candidates that differ from `ids` in at most `n_replace` positions; single swaps are drawn without repetition."""
    length, topk = choices.shape
    if n_replace == 1:
        position = torch.arange(length).repeat_interleave(topk)
        token = choices.flatten()
        useful = permitted[position, token] & (token != ids[position])
        if not useful.any():
            return ids[None]
        position, token = position[useful], token[useful]
        picked = torch.randperm(len(token), generator=generator)[:width]
        candidates = ids.repeat(len(picked), 1)
        candidates[torch.arange(len(picked)), position[picked]] = token[picked]
        return candidates
    order = torch.rand(width, length, generator=generator).argsort(-1)[:, :n_replace]
    token = choices[order, torch.randint(topk, (width, n_replace), generator=generator)]
    kept = torch.where(permitted[order, token], token, ids[order])
    return ids.repeat(width, 1).scatter(1, order, kept)


def _starts(
    permitted: Bool[Tensor, "trigger vocab"],
    count: int,
    initial: Int[Tensor, "starts trigger"] | None,
    generator: torch.Generator,
) -> Int[Tensor, "count trigger"]:
    """The given first triggers, then random ones."""
    starts = random_triggers(permitted, count, generator)
    if initial is None:
        return starts
    return torch.cat([initial.cpu(), starts])[:count]


def _begin(engine: Engine, objective: Objective, starts: Int[Tensor, "count trigger"]) -> list[_Restart]:
    """Restarts at the given triggers; one that does not re-tokenise is a place to start from but no find."""
    losses = engine.losses(objective, starts)
    found = [_found(ids, loss) for ids, loss in zip(starts, losses, strict=True)]
    typable = [engine.problem.retokenizes(list(item.trigger_ids)) for item in found]
    return [
        _Restart(ids, item if good else item._replace(loss=float("inf")))
        for ids, item, good in zip(starts, found, typable, strict=True)
    ]


def _found(ids: Int[Tensor, "trigger"], loss: Float[Tensor, ""]) -> Found:
    """As plain numbers."""
    return Found(tuple(ids.tolist()), float(loss))
