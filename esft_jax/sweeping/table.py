"""The table of a sweep: for each method, mean and spread over seeds."""

import csv
import io
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from esft_jax.sweeping.config import BASE, SweepConfig, base_cells, method_cells, search_cells
from esft_jax.sweeping.record import CellResult, Record


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (of the sample; 0 for one value) over `count` values."""

    mean: float
    deviation: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of at least one value."""
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        return cls(statistics.fmean(values), deviation, len(values))

    def text(self, digits: int) -> str:
        """Mean and, of several values, standard deviation."""
        deviation = f" ± {self.deviation:.{digits}f}" if self.count > 1 else ""
        return f"{self.mean:.{digits}f}{deviation}"


@dataclass(frozen=True)
class MethodRow:
    """What the finished cells of a method say; of seeds that all tasks are finished with.

    A seed with which a run diverged is left out.

    Attributes:
        learning_rate: the one that was chosen; None if there was no choice.
        values: the task's metric, by task.
        average: mean over tasks, of which the spread is over seeds.
        valid_loss: mean and spread of the validation loss over tasks, nats per target token.
        retention: mean held-out loss over what was not trained on, and over tasks, in nats.
        others: metric of each task that was not trained on, mean over tasks, by name.
        trained_share: of the parameters, mean over tasks.
        experts: trained, or updated; None where all are, or none.
        stored_bytes, step_bytes, seconds: as `experts`, means over tasks and seeds.
    """

    method: str
    learning_rate: float | None
    values: dict[str, Spread]
    average: Spread
    valid_loss: Spread
    retention: Spread | None
    others: dict[str, Spread]
    trained_share: float
    experts: float | None
    stored_bytes: float
    step_bytes: float | None
    seconds: float


def best_learning_rate(sweep: SweepConfig, record: Record, method: str) -> float | None:
    """The learning rate with the lowest validation loss, averaged over the tasks.

    All cells of the search must be finished. One that diverged has an infinite loss.
    """
    losses: dict[float | None, list[float]] = {}
    for cell in search_cells(sweep):
        if cell.method == method:
            loss = record.results[cell].valid_loss
            losses.setdefault(cell.learning_rate, []).append(math.inf if loss is None else loss)
    return min(losses, key=lambda rate: statistics.fmean(losses[rate]))


def summarise(sweep: SweepConfig, record: Record) -> list[MethodRow]:
    """A row for the base and for each method that has finished cells on all tasks."""
    rows = []
    base = [record.results[cell] for cell in base_cells(sweep) if cell in record.results]
    if len(base) == len(sweep.tasks):
        rows.append(_row(BASE, None, [base]))
    for method in sweep.methods:
        searched = [cell for cell in search_cells(sweep) if cell.method == method]
        if not all(cell in record.results for cell in searched):
            continue
        rate = best_learning_rate(sweep, record, method)
        by_seed: dict[int, list[CellResult]] = {}
        for cell in method_cells(sweep, method, rate):
            if cell in record.results and record.results[cell].value is not None:
                by_seed.setdefault(cell.seed, []).append(record.results[cell])
        whole = [results for results in by_seed.values() if len(results) == len(sweep.tasks)]
        if whole:
            rows.append(_row(method, rate, whole))
    return rows


def _row(method: str, rate: float | None, by_seed: Sequence[Sequence[CellResult]]) -> MethodRow:
    results = [result for seed in by_seed for result in seed]
    by_task: dict[str, list[float]] = {}
    averages: list[float] = []
    losses: list[float] = []
    others: dict[str, list[float]] = {}
    for seed in by_seed:
        values = {result.cell.task: result.value for result in seed if result.value is not None}
        averages.append(statistics.fmean(values.values()))
        losses.append(statistics.fmean(r.valid_loss for r in seed if r.valid_loss is not None))
        for task, value in values.items():
            by_task.setdefault(task, []).append(value)
        for name in dict.fromkeys(name for result in seed for name in result.other_values):
            found = [r.other_values[name] for r in seed if name in r.other_values]
            others.setdefault(name, []).append(statistics.fmean(found))
    forgotten = [
        statistics.fmean(statistics.fmean(result.retention.values()) for result in seed)
        for seed in by_seed
        if all(result.retention for result in seed)
    ]
    step_bytes = [result.step_bytes for result in results if result.step_bytes is not None]
    experts = [result.experts for result in results if result.experts is not None]
    return MethodRow(
        method,
        rate,
        {task: Spread.of(values) for task, values in by_task.items()},
        Spread.of(averages),
        Spread.of(losses),
        Spread.of(forgotten) if forgotten else None,
        {name: Spread.of(values) for name, values in others.items()},
        statistics.fmean(r.trained / r.total if r.total else 0.0 for r in results),
        statistics.fmean(experts) if experts else None,
        statistics.fmean(result.stored_bytes for result in results),
        statistics.fmean(step_bytes) if step_bytes else None,
        statistics.fmean(result.seconds for result in results),
    )


def to_csv(rows: Sequence[MethodRow]) -> str:
    """The table as CSV, a row for each method."""
    out = io.StringIO()
    tasks = list(rows[0].values) if rows else []
    others = list(dict.fromkeys(name for row in rows for name in row.others))
    writer = csv.writer(out, lineterminator="\n")
    spreads = [*tasks, "average", "valid_loss", "retention_nats"]
    spreads += [f"other_{name}" for name in others]
    heads = [f"{name}{suffix}" for name in spreads for suffix in ("", "_deviation")]
    sizes = ["trained_share", "experts", "stored_bytes", "step_bytes", "seconds"]
    writer.writerow(["method", "learning_rate", "seeds", *heads, *sizes])
    for row in rows:
        found = [*(row.values[task] for task in tasks), row.average, row.valid_loss, row.retention]
        found += [row.others.get(name) for name in others]
        numbers = [x for s in found for x in ((s.mean, s.deviation) if s else ("", ""))]
        counted = [row.trained_share, row.experts, row.stored_bytes, row.step_bytes, row.seconds]
        writer.writerow([row.method, row.learning_rate, row.average.count, *numbers, *counted])
    return out.getvalue()
