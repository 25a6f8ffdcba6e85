"""Where a run's metrics go besides its `metrics.jsonl`.

The trackers (Weights & Biases, Trackio, MLflow) have a run for each run folder, which a resumed run
goes on with. Project, server and account are said by the variables that their libraries read, such
as `WANDB_PROJECT`, `TRACKIO_SPACE_ID` and `MLFLOW_TRACKING_URI`; so are their offline modes.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from esft_jax.config import RunConfig, by_key
from esft_jax.errors import InputError
from esft_jax.files import reason
from esft_jax.processes import on_first_process
from esft_jax.train_config import LoggerName
from esft_jax.training.run_folder import RunFolder

# Seconds after which TensorBoard sees what is new.
_FLUSH = 30
# Of trackers, unless the variable of the library says another.
_PROJECT = "esft"


class Logger(Protocol):
    """A place that metrics go to."""

    def write(self, step: int, seconds: float, scalars: Mapping[str, float]) -> None:
        """Record scalars, by metric name, at a time in seconds since the epoch."""

    def close(self, failed: bool) -> None:
        """The run ends, or is stopped; or it has failed."""


class TensorBoard:
    """Event files in a folder.

    Args:
        start: the last step whose events in older files are to be shown; None forgets all.

    Raises:
        InputError: they cannot be written, for one when a disk is full.
    """

    def __init__(self, folder: Path, start: int | None):
        self._folder, first = folder, 0 if start is None else start + 1
        with written(folder):
            folder.mkdir(exist_ok=True)
            # Not `SummaryWriter`: its thread dies with a traceback when the disk is full.
            # The name that it makes has seconds; a run may go on within one.
            self._events = EventsWriter(str(folder / "events"), f".{first}")
            begin = SessionLog(status=SessionLog.START)
            self._events.write_event(Event(step=first, file_version="brain.Event:2"))
            self._events.write_event(Event(step=first, session_log=begin))
        self._flushed = time.monotonic()

    def write(self, step: int, seconds: float, scalars: Mapping[str, float]) -> None:
        """One event for each scalar."""
        with written(self._folder):
            for name, value in scalars.items():
                event = Event(wall_time=seconds, step=step, summary=scalar(name, value))
                self._events.write_event(event)
            if time.monotonic() - self._flushed > _FLUSH:  # which waits for the disk
                self._events.flush()
                self._flushed = time.monotonic()

    def close(self, failed: bool) -> None:
        """Close the file also where its last flush fails.

        tensorboardX leaves it open then, and Python complains of it when it collects it.
        """
        with written(self._folder):
            try:
                self._events.close()
            except OSError:
                with suppress(OSError):
                    self._events._py_recordio_writer.close()
                raise


class WandB:
    """A run of Weights & Biases; with `WANDB_MODE=offline` it is kept in the run folder."""

    def __init__(self, folder: RunFolder, config: RunConfig):
        self._run = import_module("wandb").init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=os.environ.get("WANDB_NAME", folder.path.resolve().name),
            id=_identity(folder),
            resume="allow",
            dir=os.environ.get("WANDB_DIR", str(folder.path)),
            config=asdict(config),
        )
        # Its own count of steps only rises: what a resumed run makes again would be dropped.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, seconds: float, scalars: Mapping[str, float]) -> None:
        """One row of its history, which has a time of its own."""
        self._run.log({"step": step, **scalars})

    def close(self, failed: bool) -> None:
        """Wait until everything is sent, or on the disk."""
        self._run.finish(exit_code=int(failed))


class Trackio:
    """A run of Trackio, in its data base on this machine or on a Space of the hub."""

    def __init__(self, folder: RunFolder, config: RunConfig):
        self._run = import_module("trackio").init(
            project=os.environ.get("TRACKIO_PROJECT", _PROJECT),
            name=f"{folder.path.resolve().name}-{_identity(folder)[:6]}",
            resume="allow",
            config=asdict(config),
            embed=False,
        )

    def write(self, step: int, seconds: float, scalars: Mapping[str, float]) -> None:
        """One row, which has a time of its own."""
        self._run.log(dict(scalars), step=step)

    def close(self, failed: bool) -> None:
        """Wait until everything is sent, or on the disk."""
        self._run.finish()


class MLflow:
    """A run of MLflow, in a data base in the working directory or on a server."""

    def __init__(self, folder: RunFolder, config: RunConfig):
        self._entities = import_module("mlflow.entities")
        self._client = import_module("mlflow").MlflowClient()
        name, identity = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT), _identity(folder)
        experiment = self._client.get_experiment_by_name(name)
        place = experiment.experiment_id if experiment else self._client.create_experiment(name)
        if found := self._client.search_runs([place], f"tags.esft_run = '{identity}'"):
            self._run = found[0].info.run_id
            self._client.update_run(self._run, "RUNNING")
            return
        started = self._client.create_run(
            place, run_name=folder.path.resolve().name, tags={"esft_run": identity}
        )
        self._run = started.info.run_id
        values = by_key(asdict(config)).items()
        params = [self._entities.Param(key, str(value)) for key, value in values]
        for begin in range(0, len(params), 100):  # the most that it takes at once
            self._client.log_batch(self._run, params=params[begin : begin + 100])

    def write(self, step: int, seconds: float, scalars: Mapping[str, float]) -> None:
        """One request."""
        milliseconds = int(1000 * seconds)
        metrics = [
            self._entities.Metric(name, value, milliseconds, step)
            for name, value in scalars.items()
        ]
        self._client.log_batch(self._run, metrics=metrics)

    def close(self, failed: bool) -> None:
        """Mark the run as ended, until it is resumed."""
        self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")


_TRACKERS: dict[LoggerName, Callable[[RunFolder, RunConfig], Logger]] = {
    "wandb": WandB,
    "trackio": Trackio,
    "mlflow": MLflow,
}


class _Tracker:
    """A tracker that is left out with a warning once it fails: training goes on."""

    def __init__(self, name: LoggerName, logger: Logger, say: Callable[[str], None]):
        self._name, self._say = name, say
        self._logger: Logger | None = logger

    def write(self, step: int, seconds: float, scalars: Mapping[str, float]) -> None:
        self._try(lambda logger: logger.write(step, seconds, scalars))

    def close(self, failed: bool) -> None:
        self._try(lambda logger: logger.close(failed))

    def _try(self, action: Callable[[Logger], None]) -> None:
        if self._logger is None:
            return
        try:
            action(self._logger)
        except Exception as error:  # each library has its own, and those of the network
            self._logger = None
            self._say(
                f"train.log_to: {self._name} failed ({_first_line(error)}); it gets no more of "
                "this run, metrics.jsonl gets all"
            )


def check_trackers(log_to: tuple[LoggerName, ...]) -> None:
    """Check that the libraries of trackers are there.

    Raises:
        InputError: one is not.
    """
    for name in log_to:
        if name in _TRACKERS and find_spec(name) is None:
            raise InputError(
                f"train.log_to: {name} is not installed; expected: pip install 'esft-jax[{name}]'"
            )


@contextmanager
def open_trackers(
    folder: RunFolder, config: RunConfig, say: Callable[[str], None]
) -> Iterator[list[Logger]]:
    """The trackers of `train.log_to`, open for the time of the block; on process 0 alone.

    They may ask for an account here.

    Args:
        folder: of a run that has begun.
        say: receives a line about a tracker that fails later.

    Raises:
        InputError: one is not installed, or cannot begin.
    """
    trackers: list[Logger] = []
    with ExitStack() as stack:

        def begin() -> None:
            check_trackers(config.train.log_to)
            for name in config.train.log_to:
                if name in _TRACKERS:
                    tracker = _Tracker(name, _begin(name, folder, config), say)
                    stack.push(partial(_end, tracker))
                    trackers.append(tracker)

        on_first_process(begin, "train.log_to")
        yield trackers


def _begin(name: LoggerName, folder: RunFolder, config: RunConfig) -> Logger:
    try:
        return _TRACKERS[name](folder, config)
    except Exception as error:  # each library has its own
        raise InputError(f"train.log_to: {name} cannot begin: {_first_line(error)}") from error


def _end(tracker: Logger, kind: type[BaseException] | None, *_: Any) -> None:
    tracker.close(kind is not None)


@contextmanager
def written(path: Path) -> Iterator[None]:
    """Say in one line that a file cannot be written."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {reason(error)}") from error


def _identity(folder: RunFolder) -> str:
    """What tells a run from others, and stays when it is resumed."""
    facts = f"{folder.begun()} {folder.path.resolve()}"
    return hashlib.sha256(facts.encode()).hexdigest()[:16]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
