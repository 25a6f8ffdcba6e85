"""The table of a sweep: for each method, mean and spread over seeds."""

import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from esft_jax.sweeping.config import BASE, SweepConfig, method_cells, search_cells
from esft_jax.sweeping.record import CellResult, Record


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (of the sample; 0 for one value) over `count` values."""

    mean: float
    deviation: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of at least one value."""
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        return cls(statistics.fmean(values), deviation, len(values))


@dataclass(frozen=True)
class MethodRow:
    """What the finished cells of a method say; of seeds that are finished on all tasks.

    Attributes:
        learning_rate: the one that was chosen; None if there was no choice.
        values: the task's metric, by task.
        average: mean over tasks, of which the spread is over seeds.
        retention: mean held-out loss over what was not trained on, and over tasks, in nats.
        trained_share: of the parameters, mean over tasks.
        stored_bytes, step_bytes, seconds: means over tasks and seeds.
    """

    method: str
    learning_rate: float | None
    values: dict[str, Spread]
    average: Spread
    retention: Spread | None
    trained_share: float
    stored_bytes: float
    step_bytes: float | None
    seconds: float


def best_learning_rate(sweep: SweepConfig, record: Record, method: str) -> float | None:
    """The learning rate with the lowest validation loss, averaged over the tasks.

    All cells of the search must be finished.
    """
    losses: dict[float | None, list[float]] = {}
    for cell in search_cells(sweep):
        if cell.method == method:
            losses.setdefault(cell.learning_rate, []).append(record.results[cell].valid_loss)
    return min(losses, key=lambda rate: statistics.fmean(losses[rate]))


def summarise(sweep: SweepConfig, record: Record) -> list[MethodRow]:
    """A row for the base and for each method that has finished cells on all tasks."""
    rows = []
    base = [result for cell, result in record.results.items() if cell.method == BASE]
    if len(base) == len(sweep.tasks):
        rows.append(_row(BASE, None, [base]))
    for method in sweep.methods:
        searched = [cell for cell in search_cells(sweep) if cell.method == method]
        if not all(cell in record.results for cell in searched):
            continue
        rate = best_learning_rate(sweep, record, method)
        by_seed: dict[int, list[CellResult]] = {}
        for cell in method_cells(sweep, method, rate):
            if cell in record.results:
                by_seed.setdefault(cell.seed, []).append(record.results[cell])
        whole = [results for results in by_seed.values() if len(results) == len(sweep.tasks)]
        rows.append(_row(method, rate, whole))
    return rows


def _row(method: str, rate: float | None, by_seed: Sequence[Sequence[CellResult]]) -> MethodRow:
    results = [result for seed in by_seed for result in seed]
    by_task: dict[str, list[float]] = {}
    for result in results:
        by_task.setdefault(result.cell.task, []).append(result.value)
    forgotten = [
        statistics.fmean(statistics.fmean(result.retention.values()) for result in seed)
        for seed in by_seed
        if all(result.retention for result in seed)
    ]
    step_bytes = [result.step_bytes for result in results if result.step_bytes is not None]
    return MethodRow(
        method,
        rate,
        {task: Spread.of(values) for task, values in by_task.items()},
        Spread.of([statistics.fmean(result.value for result in seed) for seed in by_seed]),
        Spread.of(forgotten) if forgotten else None,
        statistics.fmean(r.trained / r.total if r.total else 0.0 for r in results),
        statistics.fmean(result.stored_bytes for result in results),
        statistics.fmean(step_bytes) if step_bytes else None,
        statistics.fmean(result.seconds for result in results),
    )


def to_csv(rows: Sequence[MethodRow]) -> str:
    """The table as CSV, a row for each method."""
    out = io.StringIO()
    tasks = list(rows[0].values) if rows else []
    writer = csv.writer(out, lineterminator="\n")
    spreads = [*tasks, "average", "retention_nats"]
    heads = [f"{name}{suffix}" for name in spreads for suffix in ("", "_deviation")]
    sizes = ["trained_share", "stored_bytes", "step_bytes", "seconds"]
    writer.writerow(["method", "learning_rate", "seeds", *heads, *sizes])
    for row in rows:
        found = [*(row.values[task] for task in tasks), row.average, row.retention]
        numbers = [x for s in found for x in ((s.mean, s.deviation) if s else ("", ""))]
        counted = [row.trained_share, row.stored_bytes, row.step_bytes, row.seconds]
        writer.writerow([row.method, row.learning_rate, row.average.count, *numbers, *counted])
    return out.getvalue()
