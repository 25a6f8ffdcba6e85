"""Let a model complete tasks' prompts, judge the completions, and measure held-out losses."""

import argparse
import sys
from collections.abc import Sequence

import jax
from rich.console import Console

from esft_jax.cli import add_config_arguments, command, open_config
from esft_jax.evaluation.report import print_measures, write_comparison
from esft_jax.evaluation.run import check_evaluation, kept_evaluation, run_evaluation
from esft_jax.training.run_folder import RunFolder


@command
def main(argv: Sequence[str] | None) -> None:
    """Run `python -m esft_jax.evaluate`; None stands for the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_arguments(parser)
    parser.add_argument("--adapter", metavar="DIR", help="adapter folder (default: the base alone)")
    args = parser.parse_args(argv)
    config = open_config(args)
    inputs = check_evaluation(config)
    report = run_evaluation(config, args.adapter, inputs)
    if jax.process_index() != 0:
        return
    before = None
    if args.adapter is not None:
        before = kept_evaluation(config, inputs, report.base_fingerprint)
    console = Console()
    for name, held_out in inputs.describe().items():
        console.print(f"held out, {name}: {held_out}", soft_wrap=True)
    print_measures(console, report, before)
    console.print(f"written to {report.folder}, {report.seconds:.0f} s", soft_wrap=True)
    if before is not None:
        write_comparison(RunFolder(config.output).comparison, report, before)


if __name__ == "__main__":
    sys.exit(main(None))
