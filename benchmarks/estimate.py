"""How long the runs that are left will take, from the budgets and the processor's measured speed."""

from benchmarks import suites
from vectors.speed import matrix_rate

EFFICIENCY = 0.19
"""Operations of a search per second, as a fraction of `matrix_rate`. `make bench` at 0d8c68a on two cores of an Intel
Xeon: 40 runs of 4e11 and 40 of 8e11 operations took 714 s beside other work, which is 3.4e10 a second and core;
`matrix_rate` gives 1.75e11 on one of these cores."""


def minutes_left(budgets: list[str], rate: float, processes: int) -> float:
    """Minutes that runs with these budgets take, split over the processes; rate as `matrix_rate` gives it."""
    seconds = 0.0
    for text in budgets:
        budget = suites.parse_budget(text)
        seconds += budget.flops / (EFFICIENCY * rate) if budget.flops is not None else budget.seconds or 0.0
    return seconds / processes / 60


def announcement(budgets: list[str], processes: int, *, gpu: bool) -> str:
    """What the benchmark says before its first run: the speed that it found, and how long the runs left will take."""
    rate = matrix_rate()
    found = f"this processor: {rate / 1e9:.0f} GFLOP/s a process in float32 matrix products"
    # A GPU's time goes into starting kernels: its matrix products say nothing about these searches.
    if gpu and any(not budget.endswith("s") for budget in budgets):
        return f"{found}; runs left: {len(budgets)}, on a GPU, for which no time can be estimated"
    minutes = max(1, round(minutes_left(budgets, rate, processes)))
    return f"{found}; about {minutes} min for the runs left ({len(budgets)}, split over {processes})"
