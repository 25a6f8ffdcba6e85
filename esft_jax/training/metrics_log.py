"""Metrics of a run as they come: a progress bar, `metrics.jsonl`, other loggers."""

import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from types import TracebackType

import jax

from esft_jax.errors import InputError
from esft_jax.files import write_text_atomic
from esft_jax.progress import Progress, with_prefix
from esft_jax.training.loggers import Logger, TensorBoard, written
from esft_jax.training.run_folder import RunFolder

# What is shown of a line, and how; the progress bar has room for all but the last.
_SHOWN: dict[str, Callable[[float], str]] = {
    "train/loss": "loss {:.4g}".format,
    "valid/loss": "valid {:.4g}".format,
    "speed/tokens_per_second": lambda rate: f"{with_prefix(rate)} tokens/s",
    "speed/mfu": "mfu {:.0%}".format,
}


class MetricsLog:
    """Writes scalars by step. Only process 0 writes or shows anything.

    Lines past `start`, left by a run that was stopped after its last checkpoint, are removed, so
    that a step never stands twice in the file.

    Args:
        start: the step that the run goes on from; None of a new run.
        tensorboard: write event files for it, too.
        trackers: more loggers, which their owner closes.

    Raises:
        InputError: a file cannot be written, for one when a disk is full.
    """

    def __init__(
        self,
        folder: RunFolder,
        start: int | None,
        steps: int,
        *,
        tensorboard: bool = False,
        trackers: Sequence[Logger] = (),
    ):
        self._active, self._folder = jax.process_index() == 0, folder
        if not self._active:
            return
        _drop_after(folder, start)
        with written(folder.path):
            self._file = folder.metrics.open("a", encoding="utf-8")
        self._board = TensorBoard(folder.tensorboard, start) if tensorboard else None
        self._loggers = [*trackers, *([self._board] if self._board else [])]
        # Elsewhere than on terminals, every logged step is a line.
        self._progress = Progress("train", steps, initial=start or 0, lines=False)
        self._steps = steps
        self._shown: dict[str, str] = {}

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Record scalars, but those that are not finite, and show them beside the progress bar."""
        if not self._active:
            return
        now = time.time()
        scalars = {name: value for name, value in scalars.items() if math.isfinite(value)}
        with written(self._folder.metrics):
            self._file.write(json.dumps({"step": step, "time": now, **scalars}) + "\n")
            self._file.flush()
        for logger in self._loggers:
            logger.write(step, now, scalars)
        shown = {name: show(scalars[name]) for name, show in _SHOWN.items() if name in scalars}
        self._shown |= shown
        self._progress.show(", ".join(v for k, v in self._shown.items() if k != "speed/mfu"))
        if not self._progress.on_terminal:
            values = ", ".join(shown.values())
            left = f", {self._progress.left} left" if 0 < step < self._steps else ""
            print(f"step {step} of {self._steps}: {values}{left}", flush=True)

    def advance(self) -> None:
        """One more step done."""
        if self._active:
            self._progress.advance()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._active:
            return
        self._progress.close()
        closings: list[Callable[[], None]] = [self._close_file]
        if self._board is not None:
            closings.append(partial(self._board.close, error is not None))
        for close in closings:
            # An error that is on its way says it already.
            with nullcontext() if error is None else suppress(InputError):
                close()

    def _close_file(self) -> None:
        with written(self._folder.metrics):
            self._file.close()


def _drop_after(folder: RunFolder, start: int | None) -> None:
    if folder.metrics.exists():
        last = -1 if start is None else start
        kept = [json.dumps(line) for line in folder.logged() if line["step"] <= last]
        write_text_atomic(folder.metrics, "".join(line + "\n" for line in kept))
