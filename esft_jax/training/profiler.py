"""Profiler traces of a few steps, planned or on request."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from esft_jax.train_config import TrainConfig


class Profiler:
    """Traces `train.profile_steps` steps from `train.profile_step` on, and from the next one after
    each `request`. Every process traces itself.

    Args:
        folder: gets `step-N/process-P` for each trace, named after its first step.
    """

    def __init__(self, folder: Path, config: TrainConfig):
        self._folder, self._first, self._count = folder, config.profile_step, config.profile_steps
        self._requested = False
        self._left = 0

    def request(self) -> None:
        """Trace from the next step on."""
        self._requested = True

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Mark the block as a step of this number in a trace; begin a trace if one is due."""
        if not self._left and (self._requested or number == self._first):
            self._requested = False
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # it slows down what is measured
            # JAX names files by host, which may run several processes.
            folder = self._folder / f"step-{number}" / f"process-{jax.process_index()}"
            jax.profiler.start_trace(str(folder), profiler_options=options)
            self._left = self._count
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield

    def finish_step(self, result: jax.Array) -> None:
        """Count a step that was started; a trace ends when the last one of its steps is done.

        Args:
            result: of the step.
        """
        if not self._left:
            return
        self._left -= 1
        if not self._left:
            result.block_until_ready()
            jax.profiler.stop_trace()

    def close(self) -> None:
        """End a trace that is not complete, at the end of the run."""
        if self._left:
            jax.profiler.stop_trace()
            self._left = 0
