"""GBDA (Guo, Sablayrolles, Jegou, Kiela 2021, arXiv:2104.13733): a distribution over triggers.

Each position has log-coefficients over the tokens; Gumbel-softmax samples make the expected loss differentiable, and
hard samples of the distribution are the finds. Departures: no fluency and no similarity term, and coefficients that
begin at 0, as there is no reference text; each step's samples are also scored as tokens, so that a search cut short
has finds. GBDA does not claim the optimum: it descends on mixtures of tokens, whose loss no trigger need have.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from attacks.scoring.budget import Budget
from attacks.scoring.engine import Engine, Objective
from attacks.searchers.candidates import check_counts, permitted_in_slot
from attacks.searchers.search_log import SearchLog
from attacks.searchers.searcher import Found, OnBest


@dataclass(frozen=True, slots=True, kw_only=True)
class GBDA:
    """Shifts probability toward tokens whose mixtures lower the loss, then samples."""

    steps: int = 100
    """Gradient steps."""
    lr: float = 0.3
    """Learning rate of Adam on the log-coefficients."""
    samples: int = 10
    """Gumbel-softmax samples that a gradient is averaged over."""
    temperature: float = 1.0
    """Temperature of the Gumbel-softmax (T in the paper); lower is closer to one-hot."""
    draws: int = 100
    """Triggers sampled at the end."""
    restarts: int = 1
    """Distributions optimised side by side."""

    def __post_init__(self):
        check_counts(self, "steps", "samples", "draws", "restarts")
        for name in ("lr", "temperature"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")

    def __call__(
        self,
        engine: Engine,
        objective: Objective,
        generator: torch.Generator,
        budget: Budget | None = None,
        on_best: OnBest | None = None,
    ) -> list[Found]:
        """Successive bests over all restarts, best first; an interrupt keeps what was found."""
        problem = engine.problem
        permitted = permitted_in_slot(problem)
        barred = torch.zeros(permitted.shape).masked_fill(~permitted, -torch.inf).to(engine.device)
        with SearchLog(engine, budget, on_best) as log:
            # Theta in the paper; one distribution per restart.
            theta = torch.zeros(self.restarts, *permitted.shape, device=engine.device, requires_grad=True)
            optimizer = torch.optim.Adam([theta], lr=self.lr)
            for _ in range(self.steps):
                # samples restarts trigger vocab; -inf where a token is not permitted.
                # Gumbel noise makes the largest coefficient a draw from softmax(theta), and a softmax of the same sum a
                # differentiable stand-in for the draw.
                noisy = theta + barred + gumbel(self.samples, theta, generator)
                log.score(objective, noisy.argmax(-1).flatten(0, 1).unique(dim=0))
                if log.over:
                    break
                # The engine gives the gradient at the mixtures of tokens; autograd takes it back to theta.
                rows = (noisy / self.temperature).softmax(-1)
                _, gradient = engine.gradient(objective, rows.detach().flatten(0, 1))
                (theta.grad,) = torch.autograd.grad(rows, theta, gradient.view_as(rows).to(rows) / self.samples)
                optimizer.step()
            else:
                noisy = theta.detach() + barred + gumbel(self.draws, theta, generator)
                log.score(objective, noisy.argmax(-1).flatten(0, 1).unique(dim=0))
        return log.found


def gumbel(count: int, theta: Float[Tensor, "r trigger vocab"], generator: torch.Generator) -> Tensor:
    """Standard Gumbel noise `count r trigger vocab`; a uniform draw of exactly 0 becomes -inf: never sampled."""
    uniform = torch.rand(count, *theta.shape, generator=generator).to(theta.device)
    return -(-uniform.log()).log()
