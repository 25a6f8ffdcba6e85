"""Write the tables of docs/results.md from what was recorded: sweeps, routing, and costs of steps.

    python benchmarks/paper.py [--check]

A table stands between `<!-- table: KIND SOURCE ... -->` and `<!-- end -->`. These kinds have a row
for each `SWEEP:METHOD`; `SWEEP:all` stands for all of a sweep in configs/paper:

- `methods`: tasks, what is forgotten, and sizes;
- `first_seed`: the same of the first seed alone, for methods of sweeps with several seeds and with
  one; the base, which is named first, is not shown;
- `domains`: the held-out loss of what was not trained on, by domain;
- `search`: each learning rate that was tried;
- `choices`: ways to choose experts, at equal trained parameters: what the first gains over the
  base, and how far each other is from it, seed by seed;
- `hours`: how long a sweep took to train.

What a sweep has run is in benchmarks/records; `python -m esft_jax.sweep --config
configs/paper/SWEEP.yaml` runs what is missing. Of a file or folder:

- `routing`: how concentrated the routing of each task is, and what tasks have in common, from
  `layers.csv` and `overlap.csv`, which `esft_jax.report` writes;
- `step_cost`: from the JSON of `method_cost.py`.

With --check nothing is written: exit code 1 if a table is not that of the records.
"""

import argparse
import csv
import functools
import json
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from esft_jax.reporting.comparison import forgotten
from esft_jax.reporting.findings import size_text
from esft_jax.sweeping.config import (
    BASE,
    SweepConfig,
    base_cells,
    load_sweep,
    method_cells,
    run_config,
    search_cells,
)
from esft_jax.sweeping.record import CellResult, open_record
from esft_jax.sweeping.table import MethodRow, Spread, summarise

DOCUMENT = Path("docs/results.md")
_SAME_SIZE = 0.05  # of the trained parameters, by which choices that are compared may differ
_TABLE = re.compile(r"(<!-- table: (\w+) (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass(frozen=True)
class Line:
    """A method of a sweep.

    Attributes:
        row: over all seeds; its learning rate is that of its runs, searched or not.
        first: of the first seed.
        results: of its finished cells that did not diverge, all seeds and tasks.
        searched: of the cells that decided on its learning rate.
    """

    sweep: str
    row: MethodRow
    first: MethodRow
    results: Sequence[CellResult]
    searched: Sequence[CellResult]


@functools.cache
def lines_of(sweep_name: str) -> dict[str, Line]:
    """The finished methods of a sweep by name, the base among them."""
    sweep = sweep_of(sweep_name)
    record = open_record(sweep)
    found = {}
    firsts = summarise(replace(sweep, seeds=sweep.seeds[:1]), record)
    for row, first in zip(summarise(sweep, record), firsts, strict=True):
        cells = base_cells(sweep)
        if row.method != BASE:
            cells = method_cells(sweep, row.method, row.learning_rate)
            rate = run_config(sweep, cells[0]).optimizer.learning_rate
            row, first = replace(row, learning_rate=rate), replace(first, learning_rate=rate)
        results = [record.results[cell] for cell in cells if cell in record.results]
        results = [result for result in results if result.value is not None]
        searched = [record.results[c] for c in search_cells(sweep) if c.method == row.method]
        found[row.method] = Line(sweep_name, row, first, results, searched)
    return found


@functools.cache
def sweep_of(name: str) -> SweepConfig:
    """Its configuration."""
    return load_sweep(Path("configs/paper") / f"{name}.yaml")


def chosen_lines(names: str) -> list[Line]:
    """The lines that `SWEEP:METHOD ...` names; those that are not finished yet are left out."""
    found = []
    for name in names.split():
        sweep, _, method = name.partition(":")
        lines = lines_of(sweep)
        if method not in ("all", BASE, *sweep_of(sweep).methods):
            raise SystemExit(f"{DOCUMENT}: {name}: no such method")
        found += lines.values() if method == "all" else filter(None, [lines.get(method)])
    return found


def to_markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def methods_table(lines: Sequence[Line]) -> str:
    """What each method gains, forgets and costs; the base comes first."""
    head, rows = _gains([line.row for line in lines])
    return to_markdown(head, rows)


def first_seed_table(lines: Sequence[Line]) -> str:
    """The same with the first seed alone; the base, which comes first, is not shown."""
    head, rows = _gains([line.first for line in lines])
    return to_markdown(head, rows[1:])


def _gains(methods: Sequence[MethodRow]) -> tuple[list[str], list[list[str]]]:
    tasks, lost = list(methods[0].values), forgotten(methods)
    head = ["method", "learning rate", *tasks, "**average**", "validation loss"]
    head += ["forgotten, nats", "experts", "trained", "stored", "step memory"]
    rows = []
    for row in methods:
        across = row.retention.deviation if row.retention else 0.0
        change = lost.get(row.method)
        rows.append(
            [
                row.method,
                "" if row.learning_rate is None else f"{row.learning_rate:g}",
                *(row.values[task].text(1) for task in tasks),
                f"**{row.average.text(1)}**",
                row.valid_loss.text(3),
                "" if change is None else Spread(change, across, row.average.count).text(2),
                "" if row.experts is None else f"{row.experts:.0f}",
                "" if row.method == BASE else f"{row.trained_share:.1%}",
                "" if row.method == BASE else size_text(row.stored_bytes),
                "" if row.step_bytes is None else size_text(row.step_bytes),
            ]
        )
    return head, rows


def domains_table(lines: Sequence[Line]) -> str:
    """Held-out loss by domain, mean over tasks and seeds."""
    domains = list(lines[0].results[0].retention)
    rows = [
        [
            line.row.method,
            *(
                f"{statistics.fmean(result.retention[name] for result in line.results):.2f}"
                for name in domains
            ),
        ]
        for line in lines
    ]
    return to_markdown(["method", *domains], rows)


def search_table(lines: Sequence[Line]) -> str:
    """Every learning rate that was tried, with the first seed; the base comes first."""
    base = statistics.fmean(map(mean_loss, lines[0].results))
    rows = []
    for line in lines[1:]:
        by_rate: dict[float | None, list[CellResult]] = {}
        for result in line.searched:
            by_rate.setdefault(result.cell.learning_rate, []).append(result)
        for rate, results in by_rate.items():
            losses = [result.valid_loss for result in results if result.valid_loss is not None]
            values = [result.value for result in results if result.value is not None]
            cells = ["diverged", "", ""]
            if len(values) == len(results):
                lost = statistics.fmean(map(mean_loss, results)) - base
                means = statistics.fmean(losses), statistics.fmean(values)
                cells = [f"{means[0]:.3f}", f"{means[1]:.1f}", f"{lost:.2f}"]
            rows.append([line.row.method, "" if rate is None else f"{rate:g}", *cells])
    head = ["method", "learning rate", "validation loss", "average", "forgotten, nats"]
    return to_markdown(head, rows)


def mean_loss(result: CellResult) -> float:
    """Held-out loss, mean over domains."""
    return statistics.fmean(result.retention.values())


def choices_table(lines: Sequence[Line]) -> str:
    """What the first choice of experts gains over the base, and how each other differs from it,
    seed by seed; the base comes first.

    Raises:
        SystemExit: trained parameters differ by more than 5 %, or there is no seed in common.
    """
    base, first, *others = lines
    tasks = list(first.row.values)
    head = ["method", "trained", *tasks, "**average**", "validation loss", "forgotten, nats"]
    rows = []
    for line in [first, *others]:
        off = line.row.trained_share / first.row.trained_share - 1
        if abs(off) > _SAME_SIZE:
            raise SystemExit(
                f"{DOCUMENT}: {line.row.method} trains {line.row.trained_share:.2%}, "
                f"{first.row.method} {first.row.trained_share:.2%}; expected as many parameters"
            )
        found = _differences(line, base if line is first else first)
        rows.append(
            [
                line.row.method,
                f"{line.row.trained_share:.1%}",
                *(found[task].text(1) for task in tasks),
                f"**{found['average'].text(1)}**",
                found["loss"].text(3),
                found["forgotten"].text(2),
            ]
        )
    return to_markdown(head, rows)


def _differences(line: Line, other: Line) -> dict[str, Spread]:
    """To another line, of each seed that both have finished on all tasks; by task, and of means
    over tasks. The base is the same with all seeds.
    """
    own, others = _by_seed(line), _by_seed(other)
    if other.row.method == BASE:
        others = dict.fromkeys(own, others[min(others)])
    found: dict[str, list[float]] = {}
    for seed in sorted(own.keys() & others.keys()):
        for name, value in own[seed].items():
            found.setdefault(name, []).append(value - others[seed][name])
    if not found:
        raise SystemExit(f"{DOCUMENT}: {line.row.method}, {other.row.method}: no common seed")
    return {name: Spread.of(values) for name, values in found.items()}


def _by_seed(line: Line) -> dict[int, dict[str, float]]:
    """Metrics by task, and means over tasks of metric, validation loss and held-out loss."""
    found = {}
    for seed in sorted({result.cell.seed for result in line.results}):
        results = [result for result in line.results if result.cell.seed == seed]
        if len(results) < len(line.row.values):
            continue
        values = {r.cell.task: r.value for r in results if r.value is not None}
        losses = [r.valid_loss for r in results if r.valid_loss is not None]
        found[seed] = values | {
            "average": statistics.fmean(values.values()),
            "loss": statistics.fmean(losses),
            "forgotten": statistics.fmean(map(mean_loss, results)),
        }
    return found


def hours_table(lines: Sequence[Line]) -> str:
    """Runs of each sweep and the hours that their training took; in the end, of all."""
    rows, runs, hours = [], 0, 0.0
    for sweep_name in dict.fromkeys(line.sweep for line in lines):
        results = open_record(sweep_of(sweep_name)).results.values()
        seconds = [result.seconds for result in results if result.cell.method != BASE]
        rows.append([sweep_name, str(len(seconds)), f"{sum(seconds) / 3600:.1f}"])
        runs, hours = runs + len(seconds), hours + sum(seconds) / 3600
    rows.append(["all", str(runs), f"{hours:.1f}"])
    return to_markdown(["sweep", "runs", "hours of training"], rows)


def routing_table(folder: Path) -> str:
    """Each task of a report: means over layers, but the sum of the chosen experts."""
    layers: dict[str, list[dict[str, str]]] = {}
    for row in _rows(folder / "layers.csv"):
        layers.setdefault(row["task"], []).append(row)
    overlap = _rows(folder / "overlap.csv")
    shared = {(row["task"], row["other"]): float(row["shared_top_k"]) for row in overlap}
    mass = next(name for name in next(iter(layers.values()))[0] if re.match(r"top_\d+_gate", name))
    top = "_".join(mass.split("_")[:2]).replace("_", " ")
    chance = f"chance {float(overlap[0]['chance']):.2f}"

    def mean(column: str, pattern: str) -> list[str]:
        means = (statistics.fmean(float(row[column]) for row in rows) for rows in layers.values())
        return [format(value, pattern) for value in means]

    others = (
        statistics.fmean(shared[task, other] for other in layers if other != task)
        for task in layers
    )
    rows = [
        [f"gate mass of a layer's {top}", *mean(mass, ".1%")],
        ["effective number of experts (entropy)", *mean("effective_experts_entropy", ".1f")],
        ["chosen experts", *(str(sum(int(r["experts"]) for r in rs)) for rs in layers.values())],
        ["assignments served by them", *mean("assignments_served", ".1%")],
        ["tokens that meet at least one in a layer", *mean("tokens_served", ".0%")],
        [f"shared {top}, two halves of the task", *(f"{shared[t, t]:.2f}" for t in layers)],
        [f"shared {top} with the other tasks, mean ({chance})", *(f"{x:.2f}" for x in others)],
    ]
    return to_markdown(["", *layers], rows)


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def step_cost_table(path: Path) -> str:
    """What a step of each method takes, and its share of what full fine-tuning takes."""
    figures = json.loads(path.read_text(encoding="utf-8"))["figures"]
    full = figures["full"]
    rows = []
    for method, cost in figures.items():
        cells = [method, f"{cost['trained_share']:.1%}"]
        for key, text in (
            ("step_seconds", lambda seconds: f"{seconds:.3f} s"),
            ("step_bytes", size_text),
            ("stored_bytes", size_text),
        ):
            cells += [text(cost[key]), f"{cost[key] / full[key]:.0%}"]
        rows.append(cells)
    head = ["method", "trained", "step", "of full", "memory", "of full", "stored", "of full"]
    return to_markdown(head, rows)


SWEEP_KINDS = {
    "methods": methods_table,
    "first_seed": first_seed_table,
    "domains": domains_table,
    "search": search_table,
    "choices": choices_table,
    "hours": hours_table,
}
FILE_KINDS = {"routing": routing_table, "step_cost": step_cost_table}


def table(kind: str, source: str) -> str:
    """The table that a comment asks for."""
    if kind in FILE_KINDS:
        return FILE_KINDS[kind](Path(source))
    return SWEEP_KINDS[kind](chosen_lines(source))


def fill(text: str) -> str:
    """The document with all its tables made anew."""
    return _TABLE.sub(lambda found: found[1] + table(found[2], found[3]) + found[4], text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare")
    args = parser.parse_args(arguments)
    before = DOCUMENT.read_text(encoding="utf-8")
    after = fill(before)
    if args.check:
        return int(before != after)
    DOCUMENT.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
