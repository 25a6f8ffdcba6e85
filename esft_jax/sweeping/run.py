"""Running the cells of a sweep that are not finished."""

import dataclasses
import gc
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from esft_jax.config import RunConfig
from esft_jax.errors import Diverged, InputError
from esft_jax.evaluation.run import (
    OWN,
    EvaluationReport,
    check_evaluation,
    evaluate_result,
    run_evaluation,
)
from esft_jax.files import visible, write_text_atomic
from esft_jax.lock import locked
from esft_jax.progress import time_left
from esft_jax.sweeping.config import (
    BASE,
    Cell,
    SweepConfig,
    base_cells,
    config_sha256,
    method_cells,
    run_config,
    search_cells,
)
from esft_jax.sweeping.record import CellResult, Record, open_record
from esft_jax.sweeping.table import best_learning_rate, summarise, to_csv
from esft_jax.training.loggers import check_trackers
from esft_jax.training.loop import run_training
from esft_jax.training.run_folder import RunFolder
from esft_jax.training.setup import check_setup, open_setup

# Between looks at what other processes have finished, seconds.
POLL = 2.0


def run_sweep(sweep: SweepConfig, say: Callable[[str], None] = print) -> Record | None:
    """Run what is not finished: the base, the search for learning rates, the other seeds.

    Every finished cell is a line of `results.jsonl` in the output folder and is never run again;
    one that was interrupted goes on from its last checkpoint. `table.csv` has what is known so far.
    Processes that work on the same sweep divide its cells among them.

    Returns:
        All results; None if SIGTERM stopped the run of a cell, which saved.

    Raises:
        KeyboardInterrupt: SIGINT stopped it.
        InputError: a cell cannot run, or was run with other settings; before any is run.
    """
    record = open_record(sweep)
    first = [*base_cells(sweep), *search_cells(sweep)]
    # The search has run the first seed of the best learning rate.
    others = len(sweep.methods) * len(sweep.tasks) * (len(sweep.seeds) - 1)
    pace = _Pace(len(first) + others)
    _check([cell for cell in first if cell not in record.results], sweep)
    if not _finish(sweep, record, first, say, pace):
        return None
    rest: list[Cell] = []
    for method in sweep.methods:
        rest += method_cells(sweep, method, best_learning_rate(sweep, record, method))
    if not _finish(sweep, record, rest, say, pace):
        return None
    _write_table(sweep, record)  # another process may have written an older one last
    return record


class _Pace:
    """How far a sweep is, and how long it will take at the pace of this process.

    Attributes:
        cells: that this process has finished.
    """

    def __init__(self, total: int):
        self._total, self.cells, self._begin = total, 0, time.monotonic()

    def describe(self, cell: Cell, finished: int) -> str:
        """A line for a cell that begins.

        Args:
            finished: cells, of all processes.
        """
        line = f"cell {finished + 1} of {self._total}: {cell.name}"
        if self.cells:
            seconds = time.monotonic() - self._begin
            line += f"; about {time_left(seconds, self.cells, self._total - finished)} left"
        return line


def _check(cells: Sequence[Cell], sweep: SweepConfig) -> None:
    """Find what a cell's run would refuse, so that none is run in vain; see `check_setup`."""
    read: list[tuple[object, ...]] = []
    for cell in cells:
        config = run_config(sweep, cell)
        data = (config.model, config.data, config.evaluation)
        try:
            check_trackers(config.train.log_to)
            if data not in read:  # most cells of a task share them
                check_evaluation(config)
            if cell.method == BASE:
                continue
            if data in read:
                check_setup(config)
            else:
                open_setup(config)
                read.append(data)
        except InputError as error:
            raise InputError(f"cell {cell.name}: {error}") from None


def _finish(
    sweep: SweepConfig,
    record: Record,
    cells: Sequence[Cell],
    say: Callable[[str], None],
    pace: "_Pace",
) -> bool:
    """Run cells that no other process runs, until all are finished; False if a signal stops one."""
    output, configs = Path(sweep.output), {cell: run_config(sweep, cell) for cell in cells}
    hashes = {cell: config_sha256(config) for cell, config in configs.items()}

    def unfinished() -> list[Cell]:
        record.refresh()
        return [cell for cell in cells if record.find(cell, hashes[cell]) is None]

    waiting = False
    while left := unfinished():
        ran = False
        for cell in left:
            with locked(output / "claims" / cell.name.replace("/", "_")) as ours:
                if not ours or cell not in unfinished():
                    continue
                say(pace.describe(cell, len(record.results)))
                result = run_cell(cell, configs[cell], hashes[cell], say)
                if result is None:
                    return False
                record.add(result)
                pace.cells += 1
                # What was trained stays; what it could be resumed from is many times as large.
                shutil.rmtree(RunFolder(configs[cell].output).checkpoints, ignore_errors=True)
            _write_table(sweep, record)
            ran = True
        if not ran:
            if not waiting:
                say(f"waiting for {len(left)} cells that other processes run")
            time.sleep(POLL)
        waiting = not ran
    return True


def _write_table(sweep: SweepConfig, record: Record) -> None:
    record.refresh()
    write_text_atomic(Path(sweep.output) / "table.csv", to_csv(summarise(sweep, record)))


def run_cell(
    cell: Cell, config: RunConfig, sha256: str, say: Callable[[str], None]
) -> CellResult | None:
    """Run one cell to its end; None if a signal stopped it."""
    inputs = check_evaluation(config)
    if cell.method == BASE:
        return _judged(cell, sha256, run_evaluation(config, None, inputs))
    try:
        result = run_training(open_setup(config), say)
        if result.result is None:
            say(f"cell {cell.name}: stopped at step {result.step} and saved")
            if result.stopped_by == signal.SIGINT:
                raise KeyboardInterrupt
            return None
        return dataclasses.replace(
            _judged(cell, sha256, evaluate_result(config, result.result, inputs)),
            trained=result.trained,
            total=result.total,
            experts=None if result.experts is None else result.experts.num_experts_selected,
            stored_bytes=sum(f.stat().st_size for f in visible(result.result, "*.safetensors")),
            step_bytes=result.step_bytes,
            step_seconds=None if result.timing.step is None else result.timing.step.p50,
            seconds=sum(result.timing.spent.values()),
        )
    except Diverged as error:
        say(f"cell {cell.name}: {error}")
        return CellResult(cell, sha256, config.evaluation.metric, None, None)
    finally:
        # The next cell compiles other programs.
        jax.clear_caches()
        gc.collect()


def _judged(cell: Cell, sha256: str, report: EvaluationReport) -> CellResult:
    own = report.scores[OWN]
    others = {name: score for name, score in report.scores.items() if name != OWN}
    # `load_sweep` has checked that there is such data.
    assert own.metric is not None and own.value is not None and own.heldout is not None
    return CellResult(
        cell,
        sha256,
        own.metric,
        own.value,
        own.heldout.nats_per_token,
        retention={n: s.heldout.nats_per_token for n, s in others.items() if s.heldout},
        other_values={n: s.value for n, s in others.items() if s.value is not None},
    )
