"""Let a model complete tasks' prompts, judge the completions, and measure held-out losses."""

import argparse
import sys
from collections.abc import Sequence

import jax
from rich.console import Console

from esft_jax.cli import add_config_arguments, command, open_config
from esft_jax.evaluation.report import print_measures, write_comparison
from esft_jax.evaluation.run import check_evaluation, kept_evaluation, run_evaluation
from esft_jax.hf.adapter import load_adapter


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
    print_measures(console, report, before)
    lines = []
    trained = None if args.adapter is None else load_adapter(args.adapter).run_dtype
    if trained is not None and trained != config.dtype:
        lines.append(f"dtype: evaluated in {config.dtype}; the adapter's run had {trained}")
    if report.kept:
        lines.append(f"taken over from an earlier evaluation: {', '.join(report.kept)}")
    lines.append(f"written to {report.folder}, {report.seconds:.0f} s")
    if before is not None:
        lines.append(f"comparison: {write_comparison(report, before)}")
    print("\n".join(lines))


if __name__ == "__main__":
    sys.exit(main(None))
