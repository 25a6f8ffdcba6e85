"""What the finished cells of a sweep have given, one line each, so that none is run twice."""

import dataclasses
import fcntl
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from esft_jax.errors import InputError
from esft_jax.files import checked, read_json_lines
from esft_jax.sweeping.config import (
    BASE,
    Cell,
    SweepConfig,
    all_cells,
    base_cells,
    config_sha256,
    run_config,
)


@dataclass(frozen=True)
class CellResult:
    """One finished cell.

    Attributes:
        config_sha256: of its run configuration.
        metric, value: the task's metric, in percent; None if the run diverged.
        valid_loss: on the task's validation data, nats per target token; None if the run diverged.
        retention: held-out loss of what was not trained on, nats per token, by name.
        other_values: metrics of tasks that were not trained on, in percent, by name.
        trained, total: parameters.
        experts: that were trained; None if they were not chosen.
        stored_bytes: of the run's result.
        step_bytes: arguments and temporaries of the training step, per device.
        step_seconds: median time of an update; None if none was left when the run was resumed.
        seconds: of updates, evaluation losses and checkpoints, whenever the run was resumed.
    """

    cell: Cell
    config_sha256: str
    metric: str
    value: float | None
    valid_loss: float | None
    retention: dict[str, float] = field(default_factory=dict)
    other_values: dict[str, float] = field(default_factory=dict)
    trained: int = 0
    total: int = 0
    experts: int | None = None
    stored_bytes: int = 0
    step_bytes: int | None = None
    step_seconds: float | None = None
    seconds: float = 0.0


class Record:
    """The finished cells, in a JSON Lines file that only ever grows; processes may share it."""

    def __init__(self, path: Path):
        self.path = path
        self.results: dict[Cell, CellResult] = {}
        self.refresh()

    def refresh(self) -> None:
        """Read what other processes have finished meanwhile.

        Raises:
            InputError: naming the line and the key that is damaged.
        """
        if not self.path.exists():
            return
        for where, line in read_json_lines(self.path, growing=True):
            result = checked(CellResult, line, where)
            if (result.value is None) != (result.valid_loss is None):
                raise InputError(
                    f"{where}: value is {result.value} and valid_loss {result.valid_loss}; "
                    "expected numbers, or null for both"
                )
            if result.cell.method == BASE and result.value is None:
                raise InputError(f"{where}: value is None; expected a number for the base")
            self.results[result.cell] = result

    def find(self, cell: Cell, config_sha256: str) -> CellResult | None:
        """The result of a cell, if it is finished.

        Raises:
            InputError: it was run with other settings.
        """
        found = self.results.get(cell)
        if found is not None and found.config_sha256 != config_sha256:
            raise InputError(
                f"{self.path}: cell {cell.name} was run with other settings; expected the same "
                "ones, or another output"
            )
        return found

    def add(self, result: CellResult) -> None:
        """Write down a finished cell."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(dataclasses.asdict(result)) + "\n"
        with self.path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)  # a kill may leave half a line behind
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
        self.results[result.cell] = result


def open_record(sweep: SweepConfig) -> Record:
    """What the cells of a sweep have given so far.

    Raises:
        InputError: one was run with other settings than the sweep has now.
    """
    record = Record(Path(sweep.output) / "results.jsonl")
    for cell in [*base_cells(sweep), *all_cells(sweep)]:
        if cell in record.results:
            record.find(cell, config_sha256(run_config(sweep, cell)))
    return record
