"""Let a model complete a task's prompts, judge the completions, and measure its held-out loss."""

import argparse
import sys
from collections.abc import Sequence

import jax
from rich.console import Console
from rich.table import Table

from esft_jax.cli import add_config_arguments, command, open_config
from esft_jax.evaluation.tasks import EvaluationReport, run_evaluation


@command
def main(argv: Sequence[str] | None) -> None:
    """Run `python -m esft_jax.evaluate`; None stands for the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_arguments(parser)
    parser.add_argument("--adapter", metavar="DIR", help="adapter folder (default: the base alone)")
    args = parser.parse_args(argv)
    config = open_config(args)
    report = run_evaluation(config, args.adapter)
    if jax.process_index() == 0:
        print_report(report, Console())


def print_report(report: EvaluationReport, console: Console) -> None:
    """Print the scores and where they lie."""
    table = Table(show_header=False)
    table.add_row(f"{report.metric}, %", f"{report.value:.1f}")
    if report.heldout is not None:
        table.add_row("held-out loss, nats per token", f"{report.heldout.nats_per_token:.4f}")
        if report.heldout.bits_per_byte is not None:
            table.add_row("held-out bits per byte", f"{report.heldout.bits_per_byte:.4f}")
    table.add_row("completions", str(report.rows))
    table.add_row("seconds", f"{report.seconds:.0f}")
    console.print(table)
    console.print(f"written to {report.folder}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main(None))
