"""How long steps take, and where the time of a run goes."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import jax
import numpy as np

# What a run's time is counted as; the rest is starting, work done again after a kill, and pauses.
Kind = Literal["steps", "evaluation", "checkpoints"]
Spent = dict[Kind, float]


@dataclass(frozen=True)
class Percentiles:
    """Percentiles of step times, in seconds."""

    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Percentiles":
        """The percentiles of at least one step."""
        p50, p90, p99, most = np.percentile(seconds, (50, 90, 99, 100))
        return cls(float(p50), float(p90), float(p99), float(most))


@dataclass(frozen=True)
class RunTiming:
    """Where the time of a run went, from its first start to the end of its training.

    Attributes:
        step: times of the steps of this call; None if it made none.
        elapsed: seconds since the run was first started, whatever happened in between.
        spent: of these, seconds by kind, of work that counts: not of steps that were done again.
    """

    step: Percentiles | None
    elapsed: float
    spent: Spent

    @property
    def goodput(self) -> float:
        """Share of the time that was spent stepping."""
        return self.spent["steps"] / self.elapsed


class Stopwatch:
    """Times the steps and the other work of a training loop.

    Steps run in the background, and their results are waited for one step late: then the next one
    is under way already, and waiting costs nothing.

    Args:
        begun: when the run was first started, seconds since the epoch.
        spent: what was counted up to the checkpoint that the run continues from.
        clock: seconds since any moment.
    """

    def __init__(
        self,
        begun: float,
        spent: Spent | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._begun, self._clock = begun, clock
        self.spent = spent or dict.fromkeys(get_args(Kind), 0.0)
        self._steps: list[float] = []
        self._logged = 0
        self._input = 0.0
        self._running: jax.Array | None = None
        self._last = clock()

    @contextmanager
    def waiting_for_input(self) -> Iterator[None]:
        """Time the wait for a batch, which may lie within the step before."""
        begin = self._clock()
        yield
        self._input += self._clock() - begin

    def step(self, result: jax.Array) -> None:
        """Count a step that was started; waits for the step before it.

        Args:
            result: of the step.
        """
        self._finish()
        self._running = result

    def _finish(self) -> None:
        if self._running is None:
            return
        self._running.block_until_ready()
        now = self._clock()
        self._steps.append(now - self._last)
        self.spent["steps"] += now - self._last
        self._last, self._running = now, None

    @contextmanager
    def other(self, kind: Kind) -> Iterator[None]:
        """Time other work than steps, when the last step is done."""
        self._finish()
        begin = self._clock()
        yield
        self._last = self._clock()
        self.spent[kind] += self._last - begin

    @contextmanager
    def of_others(self) -> Iterator[None]:
        """Leave out what is not work of the run, when the last step is done."""
        self._finish()
        yield
        self._last = self._clock()

    def lap(self) -> tuple[list[float], float]:
        """Seconds of each step since the last lap, and of all their waits for input.

        Waits for the last step.
        """
        self._finish()
        steps, waited = self._steps[self._logged :], self._input
        self._logged, self._input = len(self._steps), 0.0
        return steps, waited

    def timing(self) -> RunTiming:
        """All so far."""
        self._finish()
        step = Percentiles.of(self._steps) if self._steps else None
        return RunTiming(step, time.time() - self._begun, dict(self.spent))
