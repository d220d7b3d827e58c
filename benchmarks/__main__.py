"""The benchmark: recovers the triggers of planted models and writes a table and attack curves.

    accelerate launch --multi_gpu --num_processes 2 -m benchmarks --suite quick --out results/quick

Runs are split over the processes as each becomes free; every finished run is one line of rows.jsonl. The same command
goes on where an earlier one stopped.
"""

import os
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Annotated, Literal

# `accelerate launch benchmarks` runs this folder as a script: the project is then not on the path.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch  # noqa: E402
import transformers  # noqa: E402
import tyro  # noqa: E402
from accelerate import PartialState  # noqa: E402
from filelock import FileLock, Timeout  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import (  # noqa: E402
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,  # noqa: E402
)
from rich.text import Text  # noqa: E402

from benchmarks import estimate, figures, rows, suites, tables  # noqa: E402
from benchmarks.run import Bench, run  # noqa: E402
from vectors.command_line import help_from_docstrings


@dataclass(frozen=True, slots=True, kw_only=True)
@help_from_docstrings
class Arguments:
    """Recover the triggers of planted models; table and curves at the end."""

    suite: str = "quick"
    """Grid of runs: quick (minutes, one seed), standard (three seeds), or real (organisms in pretrained bases, two
    seeds)."""
    models: Path | None = None
    """Folder of planted models; the suite real runs all with a card there, besides the shipped ones."""
    organisms: tuple[str, ...] | None = None
    """Planted models to run on instead of the suite's; python -m benchmarks.organisms list prints all."""
    attacks: tuple[str, ...] | None = None
    """Attacks to run instead of the suite's."""
    knowledge: tuple[str, ...] | None = None
    """What the attacker knows: K0 (model and clean prompts), K1 (also the behaviour), K2 (also the clean base),
    KB (the clean base, but not the behaviour)."""
    seeds: tuple[int, ...] | None = None
    """Random seeds, one run each, instead of the suite's."""
    budget: Annotated[str | None, tyro.conf.arg(aliases=["--flops"])] = None
    """What each run may spend instead of the suite's budget: seconds such as 20s, or floating-point operations such as
    2e12."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the weights; auto is the faster one on a GPU, and float32 on a CPU, where a run then does not
    depend on the processor. bfloat16 is faster on processors that have instructions
    for it. A run that is done in one format is not repeated in another: give another folder."""
    out: Path = Path("results/quick")
    """Folder for rows, table and figures; an earlier run there is continued."""


def threads(environment: Mapping[str, str]) -> int:
    """CPU threads of this process: its share of the cores, or by itself what OMP_NUM_THREADS says.

    Two busy processes of two threads each on two cores take many times as long as with one each.
    """
    if "LOCAL_WORLD_SIZE" in environment:  # the launcher sets OMP_NUM_THREADS to 1, however many cores there are
        return max(1, (os.cpu_count() or 1) // int(environment["LOCAL_WORLD_SIZE"]))
    return int(environment.get("OMP_NUM_THREADS") or os.cpu_count() or 1)


def pending(out: Path, jobs: list[suites.Job], suite: suites.Suite) -> list[suites.Job]:
    """Jobs without a good row."""
    done = rows.done(out)
    return [job for job in jobs if (job, suite.budget(job)) not in done]


def work(out: Path, jobs: list[suites.Job], suite: suites.Suite, state: PartialState, console: Console) -> None:
    """Takes one free job after another; a lock file per job keeps the processes apart."""
    device = str(state.device) if "cuda" in str(state.device) else "cpu"
    bench = Bench(device=device, models=suite.models, most=suite.held_out, dtype=suite.dtype)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not state.is_main_process) as progress:
        bar = progress.add_task("runs", total=len(jobs))
        # Neighbouring jobs share no organism: each process keeps to one organism as long as it can.
        for job in sorted(jobs, key=lambda job: (job.organism, job.seed)):
            try:
                # No waiting: a job that another process holds is left to it, and this one goes on to the next.
                lock = FileLock(out / "locks" / f"{'.'.join(map(str, job))}.lock").acquire(timeout=0)
            except Timeout:
                continue
            with lock:
                # The other process may have finished the job between the listing and the lock.
                if not pending(out, [job], suite):
                    continue
                progress.update(bar, description=f"{job.organism} {job.attack} seed {job.seed}")
                row = run(bench, job, suite.budget(job))
                rows.append(out, row)
                left = len(pending(out, jobs, suite))
                progress.update(bar, completed=len(jobs) - left)
                console.print(summary(row))


def plain_console(file: IO[str] | None = None) -> Console:
    """Prints text as it is: recovered text may hold brackets and colons, which rich would take for markup."""
    return Console(file=file, soft_wrap=True, markup=False, emoji=False, highlight=False)


def check_writable(out: Path) -> None:
    """Makes the folder of a run; raises ValueError where it cannot be written, before anything is run."""
    try:
        (out / "locks").mkdir(parents=True, exist_ok=True)
        # A file of this process's own, for all processes try the folder at the same moment.
        (out / "locks" / f"{os.getpid()}.try").touch()
        (out / "locks" / f"{os.getpid()}.try").unlink()
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written: {error.strerror}; give another folder") from error


def summary(row: rows.Row) -> Text:
    """One line per run for the log; as `Text`, in which no console looks for markup or emoji."""
    name = f"{row['organism']:14} {row['attack']:20} seed {row['seed']}"
    if row["error"]:
        return Text(f"{name} failed: {row['error'][:200]}")
    share, seconds = f"ASR {row['asr_recovered']:.2f}", f"{row['seconds']:5.0f} s"
    return Text(f"{name} {row['verdict']:10} {share} {seconds}  {row['recovered']!r}")


def announce(
    arguments: Arguments, suite: suites.Suite, todo: list[suites.Job], processes: int, console: Console
) -> None:
    """Says what each run may spend, how fast the processor is and how long the runs left will take."""
    console.print(", ".join(f"{limit} each in {knowledge}" for knowledge, limit in suite.budgets.items()))
    if not (arguments.attacks or suites.nanogcg_installed()):
        console.print("nanogcg is left out: its package is not installed; pip install -e '.[peer]'")
    if todo:
        budgets = [suite.budget(job) for job in todo]
        console.print(estimate.announcement(budgets, processes, gpu=torch.cuda.is_available()))


def settle(out: Path, jobs: list[suites.Job]) -> None:
    """Waits until no other process holds a job: a lock that can be had is of a job that is finished or was given up."""
    for job in jobs:
        with FileLock(out / "locks" / f"{'.'.join(map(str, job))}.lock"):
            pass


def main(arguments: Arguments) -> int:
    """Runs the suite; 0 if every run ended well, 1 if one failed, 2 for bad arguments."""
    console = plain_console()
    transformers.utils.logging.disable_progress_bar()  # eight small models load; only the runs are worth a bar
    warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated")  # peft asks for it
    try:
        suite = suites.choose(
            arguments.suite,
            arguments.organisms,
            arguments.attacks,
            arguments.seeds,
            arguments.budget,
            arguments.knowledge,
            arguments.models,
        )
        suite = replace(suite, dtype=arguments.dtype)
        if arguments.out.exists() and not arguments.out.is_dir():
            raise ValueError(f"--out {arguments.out} is a file; give a folder")
        check_writable(arguments.out)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    state = PartialState(cpu=not torch.cuda.is_available())
    torch.set_num_threads(threads(os.environ))
    out = arguments.out
    # Before anything counts as done: a run that was killed while it wrote leaves half a line.
    damaged = rows.mend(out)
    if damaged:
        console.print(f"set {damaged} damaged line(s) aside in {out / 'rows.damaged.jsonl'}")
    jobs = suites.jobs(suite)
    todo = pending(out, jobs, suite)
    if state.is_main_process:
        console.print(f"{len(jobs)} runs, {len(jobs) - len(todo)} already done, {out=!s}")
        announce(arguments, suite, todo, state.num_processes, console)
    began = time.time()
    try:
        work(out, todo, suite, state, console)
    except KeyboardInterrupt:
        left = len(pending(out, jobs, suite))
        console.print(f"interrupted; {left} of {len(jobs)} runs left, the same command goes on")
        return 130
    if not state.is_main_process:
        return 0
    # One process draws tables and figures, and only once the others have written their last rows.
    settle(out, todo)
    left = pending(out, jobs, suite)
    for path in (*tables.write(out), *figures.write(out)):
        console.print(f"wrote {path}")
    console.print(f"{len(jobs) - len(left)} of {len(jobs)} runs done in {time.time() - began:.0f} s")
    if left:
        console.print(f"{len(left)} failed or were given up: {', '.join(map(str, left[:4]))}; see rows.jsonl")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, prog="benchmarks", description=__doc__)))
