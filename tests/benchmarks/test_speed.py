"""The studies of speed and memory: what is timed, what is refused, and (slow) that a step fits into memory."""

import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.organisms.pretrained.fetch import path_of
from benchmarks.studies.real_size.memory import Memory
from benchmarks.studies.real_size.memory import main as memory_main
from benchmarks.studies.real_size.tropt_peer import running
from benchmarks.studies.speed import Speed, main, step


def test_a_step_is_what_more_steps_take_more():
    asked = []

    def run(steps):
        asked.append(steps)
        return 10.0 + 2.0 * steps, 100.0 + 7.0 * steps  # set-up and steps

    assert step(run, 4) == (2.0, 7.0)
    assert asked == [1, 5]


@pytest.mark.parametrize("python", [Path(sys.executable), Path("no/such/python")])
def test_an_environment_without_tropt_is_refused(python):
    unused: Any = None
    with (
        pytest.raises(ValueError, match=f"{python} has no TROPT; make an environment of its own"),
        running(python, unused, unused, {}),
    ):
        pass


@pytest.mark.parametrize("wrong", [{"restarts": 0}, {"random_layers": 1}, {"model": "none such"}])
def test_bad_settings_of_the_speed_study_are_one_line(capsys, wrong):
    with pytest.raises(SystemExit) as ended:
        main(Speed(**wrong))
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [Memory(), Memory(model="smollm2", random_layers=16, vocabulary=128_256, search_width=32)]
)
def test_a_step_of_each_objective_fits_into_12_gib(settings):
    if not path_of(settings.model).is_file():
        pytest.skip(f"needs the base: python -m benchmarks.organisms fetch {settings.model}")
    assert memory_main(settings) == 0
