"""Running the cells of a sweep that are not finished."""

import dataclasses
import fcntl
import gc
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from esft_jax.config import RunConfig
from esft_jax.errors import InputError
from esft_jax.evaluation.run import (
    OWN,
    EvaluationReport,
    check_evaluation,
    evaluate_result,
    run_evaluation,
)
from esft_jax.files import write_text_atomic
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
from esft_jax.sweeping.record import CellResult, Record
from esft_jax.sweeping.table import best_learning_rate, summarise, to_csv
from esft_jax.training.loop import run_training
from esft_jax.training.run_folder import RunFolder
from esft_jax.training.setup import open_setup


def run_sweep(sweep: SweepConfig, say: Callable[[str], None] = print) -> Record | None:
    """Run what is not finished: the base, the search for learning rates, the other seeds.

    Every finished cell is a line of `results.jsonl` in the output folder and is never run again;
    one that was interrupted goes on from its last checkpoint. `table.csv` has what is known so far.

    Returns:
        All results; None if a signal stopped the run of a cell, which saved.

    Raises:
        InputError: a cell cannot run, or another process works on this sweep.
    """
    output = Path(sweep.output)
    with _alone(output):
        record = Record(output / "results.jsonl")

        def finish(cells: list[Cell]) -> bool:
            for cell in cells:
                config = run_config(sweep, cell)
                sha256 = config_sha256(config)
                if record.find(cell, sha256) is not None:
                    continue
                say(f"cell {cell.name}: {len(record.results)} finished before")
                result = run_cell(cell, config, sha256)
                if result is None:
                    return False
                record.add(result)
                write_text_atomic(output / "table.csv", to_csv(summarise(sweep, record)))
            return True

        if not finish([*base_cells(sweep), *search_cells(sweep)]):
            return None
        for method in sweep.methods:
            if not finish(method_cells(sweep, method, best_learning_rate(sweep, record, method))):
                return None
    return record


def run_cell(cell: Cell, config: RunConfig, sha256: str) -> CellResult | None:
    """Run one cell to its end; None if a signal stopped it."""
    inputs = check_evaluation(config)
    if cell.method == BASE:
        return _judged(cell, sha256, run_evaluation(config, None, inputs))
    result = run_training(open_setup(config))
    if result.result is None:
        return None
    judged = dataclasses.replace(
        _judged(cell, sha256, evaluate_result(config, result.result, inputs)),
        trained=result.trained,
        total=result.total,
        experts=None if result.experts is None else result.experts.num_experts_selected,
        stored_bytes=sum(file.stat().st_size for file in result.result.glob("*.safetensors")),
        step_bytes=result.step_bytes,
        step_seconds=None if result.timing.step is None else result.timing.step.p50,
        seconds=result.seconds,
    )
    # The result stays; what it could be resumed from is many times as large.
    shutil.rmtree(RunFolder(config.output).checkpoints)
    # The next cell compiles other programs.
    jax.clear_caches()
    gc.collect()
    return judged


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


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Keep other processes from working on the same sweep."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = (output / "lock").open("w")
    except OSError as error:
        raise InputError(f"output: {output}: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"output: {output}: another process works on this sweep") from None
        yield
