"""Write the tables of docs/results.md from the recorded runs of the sweeps in configs/paper.

    python benchmarks/paper.py [--check]

A table stands between `<!-- table: SWEEP KIND -->` and `<!-- end -->`; kind `methods` has a row for
each method, `domains` the held-out loss of what was not trained on, by domain. What a sweep has run
is in benchmarks/records; `python -m esft_jax.sweep --config configs/paper/SWEEP.yaml` runs what is
missing. With --check nothing is written: exit code 1 if a table is not that of the records.
"""

import argparse
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from esft_jax.reporting.comparison import forgotten
from esft_jax.reporting.findings import size_text
from esft_jax.sweeping.config import BASE, SweepConfig, load_sweep, method_cells
from esft_jax.sweeping.record import Record
from esft_jax.sweeping.table import MethodRow, Spread, summarise

DOCUMENT = Path("docs/results.md")
_TABLE = re.compile(r"(<!-- table: (\S+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def to_markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def spread_text(spread: Spread, digits: int) -> str:
    """Mean and, of several values, standard deviation."""
    deviation = f" ± {spread.deviation:.{digits}f}" if spread.count > 1 else ""
    return f"{spread.mean:.{digits}f}{deviation}"


def methods_table(sweep: SweepConfig, record: Record, rows: Sequence[MethodRow]) -> str:
    """What each method gains, forgets and costs."""
    lost = forgotten(rows)
    head = ["method", "learning rate", *sweep.tasks, "**average**", "forgotten, nats"]
    head += ["trained", "stored", "step memory"]
    lines = []
    for row in rows:
        across = row.retention.deviation if row.retention else 0.0
        change = lost.get(row.method)
        lines.append(
            [
                row.method,
                "" if row.learning_rate is None else f"{row.learning_rate:g}",
                *(spread_text(row.values[task], 1) for task in sweep.tasks),
                f"**{spread_text(row.average, 1)}**",
                "" if change is None else spread_text(Spread(change, across, row.average.count), 2),
                "" if row.method == BASE else f"{row.trained_share:.1%}",
                "" if row.method == BASE else size_text(row.stored_bytes),
                "" if row.step_bytes is None else size_text(row.step_bytes),
            ]
        )
    return to_markdown(head, lines)


def domains_table(sweep: SweepConfig, record: Record, rows: Sequence[MethodRow]) -> str:
    """Held-out loss by domain, mean over tasks and seeds."""
    losses: dict[str, dict[str, float]] = {}
    for row in rows:
        cells = (
            [cell for cell in record.results if cell.method == BASE]
            if row.method == BASE
            else method_cells(sweep, row.method, row.learning_rate)
        )
        found = [record.results[cell].retention for cell in cells if cell in record.results]
        losses[row.method] = {
            name: statistics.fmean(values[name] for values in found) for name in found[0]
        }
    domains = list(losses[BASE])
    lines = [
        [method, *(f"{values[name]:.2f}" for name in domains)] for method, values in losses.items()
    ]
    return to_markdown(["method", *domains], lines)


KINDS = {"methods": methods_table, "domains": domains_table}


def fill(text: str) -> str:
    """The document with all its tables made anew."""

    def table(match: re.Match) -> str:
        sweep = load_sweep(Path("configs/paper") / f"{match[2]}.yaml")
        record = Record(Path(sweep.output) / "results.jsonl")
        return match[1] + KINDS[match[3]](sweep, record, summarise(sweep, record)) + match[4]

    return _TABLE.sub(table, text)


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
