"""Greedy Coordinate Gradient (Zou, Wang, Kolter, Fredrikson 2023, arXiv:2307.15043, algorithm 1), restarts batched.

Every restart keeps its own trigger. One that has not improved for `patience` steps is written down and begins anew
from random tokens: short searches from many starts in place of a long one. The loss is the mean over the prompts.

Options that are not in the paper, all off by default: the attack buffer of nanoGCG 0.3.0; gradient momentum (MAC: Zhang
& Wei 2024, arXiv:2405.01229); moves that change the length (moves.py); a first round after which few go on.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attacks.scoring.budget import Budget
from attacks.scoring.engine import Engine, Objective
from attacks.searchers.candidates import Found, OnBest, check_counts, check_one_slot, permitted_in_slot, random_triggers
from attacks.searchers.moves import Masks, by_length, propose


@dataclass(slots=True)
class _Restart:
    """Where one restart stands."""

    ids: Tensor
    best: Found
    stale: int = 0
    told: bool = False
    momentum: Tensor | None = None


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
    buffer: int = 0
    """random triggers that a restart begins with the best of; it then leaves its best for a better one only. 0: one,
    and the best candidate of a step is gone on from whether better or not. nanoGCG stores this many triggers, goes on
    from the best and replaces the worst; since none but the best is ever used, none is stored here"""
    momentum: float = 0.0
    """mu in [0, 1): tokens are ranked by m, which begins as the gradient and becomes mu * m + (1 - mu) * gradient (0.4
    in the code of MAC); where the length changes, m begins anew"""
    moves: float = 0.0
    """share of the candidates, in [0, 1], that delete, insert or exchange tokens in place of swapping them"""
    longest: int | None = None
    """tokens in a trigger at most, with `moves`; None: as many as the slot. Every restart begins with the slot full"""
    length_penalty: float = 0.0
    """added to the loss per token of the trigger where triggers are compared; what is reported is the loss alone"""
    trial: int | None = None
    """steps after which only the best `kept` restarts go on (one round of successive halving); None: all do"""
    kept: int = 1
    """restarts that go on after the trial"""
    initial: Int[Tensor, "starts trigger"] | None = field(default=None, repr=False)
    """first triggers of the first restarts; the others begin with random allowed tokens"""

    def __post_init__(self):
        check_counts(self, "steps", "search_width", "topk", "n_replace", "restarts")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience is {self.patience}; it must be at least 1, or None")
        if self.buffer < 0:
            raise ValueError(f"buffer is {self.buffer}; it must be at least 0")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum is {self.momentum}; it must lie in [0, 1)")
        if not 0 <= self.moves <= 1:
            raise ValueError(f"moves is {self.moves}; it must lie in [0, 1]")
        if self.longest is not None and not self.moves:
            raise ValueError(f"longest is {self.longest} but moves is 0: no length changes; set moves, or leave it out")
        if not 0 <= self.length_penalty < torch.inf:
            raise ValueError(f"length_penalty is {self.length_penalty}; it must be at least 0")
        if self.trial is not None and self.trial < 1:
            raise ValueError(f"trial is {self.trial}; it must be at least 1, or None")
        if not 1 <= self.kept <= self.restarts:
            raise ValueError(f"kept is {self.kept}; it must lie in [1, restarts], here {self.restarts}")

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
            ValueError: more than the allowed tokens wanted per position, more swaps than positions, a slot longer than
                the longest trigger, moves in several slots.
        """
        problem, budget = engine.problem, budget or Budget()
        permitted = permitted_in_slot(problem)
        self.check(permitted)
        if self.moves:
            check_one_slot(problem, "GCG with moves")
        lengths = range(1, (self.longest or len(permitted)) + 1) if self.moves else [len(permitted)]
        masks = {length: problem.permitted(length).cpu() for length in lengths}
        finished: list[Found] = []
        states: list[_Restart] = []
        try:
            starts = _starts(permitted, self.restarts, max(1, self.buffer), self.initial, generator)
            states = self._begin(engine, objective, starts)
            for step in range(self.steps):
                if self._report(states, on_best) or budget.exhausted:
                    break
                if step == self.trial:
                    states.sort(key=lambda state: self._cost(state.best))
                    finished += [state.best for state in states[self.kept :]]
                    del states[self.kept :]
                self._renew(engine, objective, states, finished, permitted, generator)
                self._step(engine, objective, states, masks, generator)
            else:
                self._report(states, on_best)
        except KeyboardInterrupt:
            budget.interrupt()
        runs = dict.fromkeys(finished + [state.best for state in states])
        return sorted((found for found in runs if found.loss < torch.inf), key=self._cost)

    def _step(
        self,
        engine: Engine,
        objective: Objective,
        states: list[_Restart],
        masks: Masks,
        generator: torch.Generator,
    ) -> None:
        """One GCG step of every restart: gradient, top-k, random swaps and moves, exact losses, best candidate."""
        triggers = [state.ids[None] for state in states]
        gradients = by_length(lambda ids: engine.gradient(objective, ids)[1].float().cpu(), triggers)
        proposals: list[list[Tensor]] = []
        for state, gradient in zip(states, gradients, strict=True):
            permitted = masks[len(state.ids)]
            promise = -self._smooth(state, gradient[0]).masked_fill(~permitted, torch.inf)
            choices = promise.topk(min(self.topk, int(permitted.sum(1).max())), dim=-1).indices
            proposals.append(
                propose(state.ids, choices, masks, self.search_width, self.n_replace, self.moves, generator)
            )
        parts = [part for proposal in proposals for part in proposal]
        losses = iter(by_length(lambda ids: engine.losses(objective, ids).cpu(), parts))
        for state, proposal in zip(states, proposals, strict=True):
            scores = torch.cat([next(losses) for _ in proposal])
            self._choose(engine, state, [ids for part in proposal for ids in part], scores)

    def _smooth(self, state: _Restart, gradient: Float[Tensor, "trigger vocab"]) -> Float[Tensor, "trigger vocab"]:
        """The gradient, averaged over the steps of the restart since its length changed where there is momentum."""
        if not self.momentum:
            return gradient
        if state.momentum is not None and state.momentum.shape == gradient.shape:
            gradient = self.momentum * state.momentum + (1 - self.momentum) * gradient
        state.momentum = gradient
        return gradient

    def _choose(
        self, engine: Engine, state: _Restart, candidates: list[Int[Tensor, "_"]], losses: Float[Tensor, "c"]
    ) -> None:
        """The restart goes on from the best candidate that re-tokenises; with a buffer, if it beats what there is."""
        state.stale += 1
        lengths = torch.tensor([len(ids) for ids in candidates])
        for index in (losses + self.length_penalty * lengths).argsort(stable=True)[:64].tolist():
            if engine.problem.retokenizes(candidates[index].tolist()):
                found = _found(candidates[index], losses[index])
                better = self._cost(found) < self._cost(state.best)
                if better or not self.buffer:
                    state.ids = candidates[index]
                if better:
                    state.best, state.stale, state.told = found, 0, False
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
                starts = _starts(permitted, 1, max(1, self.buffer), None, generator)
                states[index] = self._begin(engine, objective, starts)[0]

    def _begin(self, engine: Engine, objective: Objective, starts: Int[Tensor, "count pool trigger"]) -> list[_Restart]:
        """Restarts at the best of each pool; one that does not re-tokenise is a place to start from but no find."""
        count, pool, _ = starts.shape
        rows = starts.flatten(0, 1)
        found = [_found(ids, loss) for ids, loss in zip(rows, engine.losses(objective, rows), strict=True)]
        typable = [engine.problem.retokenizes(list(item.trigger_ids)) for item in found]
        found = [item if good else item._replace(loss=torch.inf) for item, good in zip(found, typable, strict=True)]
        best = [min(range(i * pool, (i + 1) * pool), key=lambda row: found[row].loss) for i in range(count)]
        return [_Restart(rows[row], found[row]) for row in best]

    def _cost(self, found: Found) -> float:
        """What triggers are compared by."""
        return found.loss + self.length_penalty * len(found.trigger_ids)

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
        if self.longest is not None and self.longest < length:
            raise ValueError(f"longest is {self.longest} but the slot has {length} tokens; raise longest")
        if self.initial is not None and self.initial.shape[-1] != length:
            raise ValueError(
                f"initial triggers have {self.initial.shape[-1]} tokens, the slot {length}; use one length"
            )


def _starts(
    permitted: Bool[Tensor, "trigger vocab"],
    count: int,
    pool: int,
    initial: Int[Tensor, "starts trigger"] | None,
    generator: torch.Generator,
) -> Int[Tensor, "count pool trigger"]:
    """`pool` triggers to choose from for each restart: the given first triggers, then random ones."""
    starts = random_triggers(permitted, count * pool, generator).unflatten(0, (count, pool))
    if initial is None:
        return starts
    return torch.cat([initial.cpu()[:, None].expand(-1, pool, -1), starts])[:count]


def _found(ids: Int[Tensor, "trigger"], loss: Float[Tensor, ""]) -> Found:
    """As plain numbers."""
    return Found(tuple(ids.tolist()), float(loss))
