"""Compare methods on tasks: run every cell of a table once, and print the table."""

import sys
from collections.abc import Sequence

from rich.table import Table

from esft_jax.cli import Parser, add_config_arguments, command, named_config
from esft_jax.errors import InputError, shown
from esft_jax.huge_pages import restart_with_huge_pages
from esft_jax.processes import split_cpu
from esft_jax.sweeping.config import base_cells, load_sweep, run_config
from esft_jax.sweeping.table import MethodRow, summarise
from esft_jax.terminal import Terminal, first_line


@command
def main(argv: Sequence[str]) -> None:
    """Run `python -m esft_jax.sweep`; None stands for the command line."""
    parser = Parser(description=__doc__)
    add_config_arguments(parser, distributed=False)
    file, overrides = named_config(parser.parse_args(argv))
    if overrides:
        raise InputError(
            f"{shown(overrides[0])}: expected this among the `overrides` in {file}, which all "
            "processes of a sweep read"
        )
    sweep = load_sweep(file)
    example = run_config(sweep, base_cells(sweep)[0])
    split_cpu(example.mesh.cpu_devices)
    from esft_jax.sweeping.run import run_sweep
    from esft_jax.training.signals import exit_on_signals

    console = Terminal()
    doing = f"sweep {len(sweep.methods)} methods x {len(sweep.tasks)} tasks into {sweep.output}"
    console.say(first_line(doing, example.dtype))
    with exit_on_signals(console.say):
        record = run_sweep(sweep, console.say)
    if record is None:
        console.say("Stopped and saved; the same command continues the sweep.")
        return
    print_table(summarise(sweep, record), console)
    for result in record.results.values():
        if result.value is None:
            console.say(f"diverged, and left out: {result.cell.name}")
    console.say(f"written to {sweep.output}/table.csv")


def print_table(rows: Sequence[MethodRow], console: Terminal) -> None:
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
