"""Step times and goodput, by a clock that the test moves."""

import math
import time

import numpy as np
import pytest

from esft_jax.training.timing import Percentiles, Stopwatch


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Result:
    """Of a step that takes so long once it is waited for."""

    def __init__(self, clock: Clock, seconds: float):
        self.clock, self.seconds = clock, seconds

    def block_until_ready(self) -> None:
        self.clock.now += self.seconds


def test_percentiles() -> None:
    seconds = list(range(1, 102))
    assert Percentiles.of(seconds) == Percentiles(51.0, 91.0, 100.0, 101.0)
    assert Percentiles.of([2.5]) == Percentiles(2.5, 2.5, 2.5, 2.5)


def test_every_second_is_counted_once() -> None:
    clock = Clock()
    watch = Stopwatch(time.time() - 1000, clock=clock)
    for seconds in (1.0, 2.0, 3.0):
        with watch.waiting_for_input():
            clock.now += 0.25
        watch.step(Result(clock, seconds))
    steps, waited = watch.lap()
    assert steps == [1.5, 2.25, 3.0]  # the first two inputs were waited for in the first step
    assert waited == 0.75
    with watch.other("evaluation"):
        clock.now += 7
    watch.step(Result(clock, 4.0))
    with watch.other("checkpoints"):  # waits for the step, which is not its own time
        clock.now += 0.5
    assert watch.lap() == ([4.0], 0.0)
    assert watch.spent == {"steps": 10.75, "evaluation": 7.0, "checkpoints": 0.5}
    timing = watch.timing()
    assert timing.step == Percentiles.of([1.5, 2.25, 3.0, 4.0])
    assert timing.goodput == pytest.approx(10.75 / 1000, rel=1e-3)


def test_a_run_that_goes_on_counts_from_its_checkpoint() -> None:
    clock = Clock()
    first = Stopwatch(time.time() - 50, clock=clock)
    first.step(Result(clock, 5.0))
    with first.other("checkpoints"):
        clock.now += 1
    saved = dict(first.spent)
    first.step(Result(clock, 5.0))  # lost
    first.lap()
    again = Stopwatch(time.time() - 50, saved, clock)
    again.step(Result(clock, 6.0))
    assert again.timing().spent == {"steps": 11.0, "evaluation": 0.0, "checkpoints": 1.0}
    assert math.isclose(again.timing().elapsed, 50, rel_tol=0.01)


def test_a_step_is_waited_for_one_step_late() -> None:
    clock = Clock()
    watch = Stopwatch(0.0, clock=clock)
    waited: list[str] = []

    class Named(Result):
        def block_until_ready(self) -> None:
            waited.append(str(self.seconds))

    watch.step(Named(clock, 1))
    assert waited == []
    watch.step(Named(clock, 2))
    assert waited == ["1"]
    watch.lap()
    assert waited == ["1", "2"]
    assert np.isfinite(watch.timing().elapsed)
