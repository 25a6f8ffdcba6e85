"""Compare methods on tasks: run every cell of a table once, and print the table."""

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from esft_jax.cli import command
from esft_jax.huge_pages import restart_with_huge_pages
from esft_jax.mesh import split_cpu
from esft_jax.sweeping.config import base_cells, load_sweep, run_config
from esft_jax.sweeping.table import MethodRow, summarise


@command
def main(argv: Sequence[str] | None) -> None:
    """Run `python -m esft_jax.sweep`; None stands for the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", metavar="FILE", required=True, help="the sweep (YAML)")
    args = parser.parse_args(argv)
    sweep = load_sweep(args.config)
    split_cpu(run_config(sweep, base_cells(sweep)[0]).mesh.cpu_devices)
    from esft_jax.sweeping.run import run_sweep
    from esft_jax.training.signals import exit_on_signals

    console = Console()
    with exit_on_signals(console.print):
        record = run_sweep(sweep, console.print)
    if record is None:
        console.print("Stopped and saved; the same command continues the sweep.")
        return
    print_table(summarise(sweep, record), console)
    for result in record.results.values():
        if result.value is None:
            console.print(f"diverged, and left out: {result.cell.name}", soft_wrap=True)
    console.print(f"written to {sweep.output}/table.csv", soft_wrap=True)


def print_table(rows: Sequence[MethodRow], console: Console) -> None:
    """Print mean and standard deviation of every method."""
    table = Table("method", "learning rate")
    tasks = list(rows[0].values)
    sizes = ("trained", "stored MB", "step MiB", "seconds")
    for title in (*tasks, "average", "retention, nats", *sizes):
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(
            row.method,
            "" if row.learning_rate is None else f"{row.learning_rate:g}",
            *(row.values[task].text(1) for task in tasks),
            row.average.text(1),
            "" if row.retention is None else row.retention.text(3),
            f"{row.trained_share:.1%}",
            f"{row.stored_bytes / 1e6:.1f}",
            "" if row.step_bytes is None else f"{row.step_bytes / 2**20:.0f}",
            f"{row.seconds:.0f}",
        )
    console.print(table)


if __name__ == "__main__":
    restart_with_huge_pages()
    sys.exit(main(None))
