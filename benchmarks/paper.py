"""Write the tables of docs/results.md from the recorded runs of the sweeps in configs/paper.

    python benchmarks/paper.py [--check]

A table stands between `<!-- table: KIND SWEEP:METHOD ... -->` and `<!-- end -->`, with a row for
each method; `SWEEP:all` stands for all of a sweep. The kind `methods` has tasks, what is forgotten,
and sizes; `domains` the held-out loss of what was not trained on, by domain. What a sweep has run
is in benchmarks/records; `python -m esft_jax.sweep --config configs/paper/SWEEP.yaml` runs what is
missing. With --check nothing is written: exit code 1 if a table is not that of the records.
"""

import argparse
import functools
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from esft_jax.reporting.comparison import forgotten
from esft_jax.reporting.findings import size_text
from esft_jax.sweeping.config import BASE, base_cells, load_sweep, method_cells
from esft_jax.sweeping.record import CellResult, Record
from esft_jax.sweeping.table import MethodRow, Spread, summarise

DOCUMENT = Path("docs/results.md")
_TABLE = re.compile(r"(<!-- table: (\w+) (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass(frozen=True)
class Line:
    """A row of a table.

    Attributes:
        results: of its finished cells, all seeds and tasks.
    """

    row: MethodRow
    results: Sequence[CellResult]


@functools.cache
def lines_of(sweep_name: str) -> dict[str, Line]:
    """The finished methods of a sweep by name, the base among them."""
    sweep = load_sweep(Path("configs/paper") / f"{sweep_name}.yaml")
    record = Record(Path(sweep.output) / "results.jsonl")
    found = {}
    for row in summarise(sweep, record):
        cells = base_cells(sweep)
        if row.method != BASE:
            cells = method_cells(sweep, row.method, row.learning_rate)
        results = [record.results[cell] for cell in cells if cell in record.results]
        found[row.method] = Line(row, results)
    return found


def chosen_lines(names: str) -> list[Line]:
    """The lines that `SWEEP:METHOD ...` names; those that are not finished yet are left out."""
    found = []
    for name in names.split():
        sweep, _, method = name.partition(":")
        lines = lines_of(sweep)
        found += lines.values() if method == "all" else filter(None, [lines.get(method)])
    return found


def to_markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def spread_text(spread: Spread, digits: int) -> str:
    """Mean and, of several values, standard deviation."""
    deviation = f" ± {spread.deviation:.{digits}f}" if spread.count > 1 else ""
    return f"{spread.mean:.{digits}f}{deviation}"


def methods_table(lines: Sequence[Line]) -> str:
    """What each method gains, forgets and costs; the base comes first."""
    tasks, lost = list(lines[0].row.values), forgotten([line.row for line in lines])
    head = ["method", "learning rate", *tasks, "**average**", "forgotten, nats"]
    head += ["trained", "stored", "step memory"]
    rows = []
    for row in (line.row for line in lines):
        across = row.retention.deviation if row.retention else 0.0
        change = lost.get(row.method)
        rows.append(
            [
                row.method,
                "" if row.learning_rate is None else f"{row.learning_rate:g}",
                *(spread_text(row.values[task], 1) for task in tasks),
                f"**{spread_text(row.average, 1)}**",
                "" if change is None else spread_text(Spread(change, across, row.average.count), 2),
                "" if row.method == BASE else f"{row.trained_share:.1%}",
                "" if row.method == BASE else size_text(row.stored_bytes),
                "" if row.step_bytes is None else size_text(row.step_bytes),
            ]
        )
    return to_markdown(head, rows)


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


KINDS = {"methods": methods_table, "domains": domains_table}


def fill(text: str) -> str:
    """The document with all its tables made anew."""
    return _TABLE.sub(lambda m: m[1] + KINDS[m[2]](chosen_lines(m[3])) + m[4], text)


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
