"""Metrics of a run: a progress bar, JSON lines, TensorBoard."""

import json
import math
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

import jax
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar
from tqdm import tqdm

from esft_jax.errors import InputError
from esft_jax.files import reason, write_text_atomic
from esft_jax.training.run_folder import RunFolder

# What the progress bar has room for.
_SHOWN = ("loss", "valid_loss", "tokens_per_second", "mfu")
# Seconds after which TensorBoard sees what is new.
_FLUSH = 30


class MetricsLog:
    """Writes scalars by step. Only process 0 writes or shows anything.

    Raises:
        InputError: a file cannot be written, for one when a disk is full.

    Lines past `start`, left by a run that was stopped after its last checkpoint, are removed, so
    that a step never stands twice in the file.
    """

    def __init__(self, folder: RunFolder, start: int, steps: int):
        self._active, self._folder = jax.process_index() == 0, folder
        if not self._active:
            return
        _drop_after(folder, start)
        with _written(folder.path):
            self._file = folder.metrics.open("a", encoding="utf-8")
            folder.tensorboard.mkdir(exist_ok=True)
            # Not `SummaryWriter`: its thread dies with a traceback when the disk is full.
            self._board = EventsWriter(str(folder.tensorboard / "events"))
            # What an earlier process wrote past the checkpoint is not shown.
            begin = SessionLog(status=SessionLog.START)
            self._board.write_event(Event(step=start + 1, file_version="brain.Event:2"))
            self._board.write_event(Event(step=start + 1, session_log=begin))
        self._flushed = time.monotonic()
        # disable=None: a bar on terminals only; elsewhere every logged step is a line.
        self._bar = tqdm(initial=start, total=steps, desc="train", unit="step", disable=None)
        self._steps = steps
        self._shown: dict[str, str] = {}

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Record scalars, but those that are not finite, and show them beside the progress bar."""
        if not self._active:
            return
        scalars = {name: value for name, value in scalars.items() if math.isfinite(value)}
        with _written(self._folder.metrics):
            self._file.write(json.dumps({"step": step, **scalars}) + "\n")
            self._file.flush()
        with _written(self._folder.tensorboard):
            for name, value in scalars.items():
                event = Event(wall_time=time.time(), step=step, summary=scalar(name, value))
                self._board.write_event(event)
            if time.monotonic() - self._flushed > _FLUSH:  # which waits for the disk
                self._board.flush()
                self._flushed = time.monotonic()
        self._shown |= {name: f"{scalars[name]:.4g}" for name in _SHOWN if name in scalars}
        self._bar.set_postfix(self._shown)
        if self._bar.disable:
            values = ", ".join(f"{name} {scalars[name]:.4g}" for name in _SHOWN if name in scalars)
            print(f"step {step} of {self._steps}: {values}", flush=True)

    def advance(self) -> None:
        """One more step done."""
        if self._active:
            self._bar.update()

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
        self._bar.close()
        for close, path in (
            (self._close_board, self._folder.tensorboard),
            (self._file.close, self._folder.metrics),
        ):
            # An error that is on its way says it already.
            with _written(path) if error is None else suppress(OSError):
                close()

    def _close_board(self) -> None:
        """Close the events' file also where its last flush fails.

        tensorboardX leaves it open then, and Python complains of it when it collects it.
        """
        try:
            self._board.close()
        except OSError:
            with suppress(OSError):
                self._board._py_recordio_writer.close()
            raise


@contextmanager
def _written(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {reason(error)}") from error


def peak_memory() -> int:
    """Most bytes in use so far: on the first local device, or by the process on a CPU."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def _drop_after(folder: RunFolder, step: int) -> None:
    if folder.metrics.exists():
        kept = [json.dumps(line) for line in folder.logged() if line["step"] <= step]
        write_text_atomic(folder.metrics, "".join(line + "\n" for line in kept))
