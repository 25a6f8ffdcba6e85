"""Let a model complete tasks' prompts, judge the completions, and measure held-out losses."""

import sys
from collections.abc import Sequence

import jax

from esft_jax.checkpoint.adapter import load_adapter
from esft_jax.cli import Parser, add_config_arguments, command, open_config, option
from esft_jax.evaluation.report import print_measures, write_comparison
from esft_jax.evaluation.run import (
    check_evaluation,
    evaluate_in_full_precision,
    kept_evaluation,
    run_evaluation,
)
from esft_jax.terminal import Terminal
from esft_jax.values import LocalPath


@command
def main(argv: Sequence[str]) -> None:
    """Run `python -m esft_jax.evaluate`; None stands for the command line."""
    parser = Parser(description=__doc__)
    add_config_arguments(parser)
    parser.add_argument(
        "--adapter",
        type=option(LocalPath),
        metavar="DIR",
        help="adapter folder (default: the base alone)",
    )
    args = parser.parse_args(argv)
    config = open_config(args)
    inputs = check_evaluation(config)
    report = run_evaluation(config, args.adapter, inputs)
    console, full = Terminal(quiet=jax.process_index() != 0), None
    if args.adapter is not None:
        full = evaluate_in_full_precision(config, args.adapter, inputs, console.say)
    if jax.process_index() != 0:
        return
    before = None
    if args.adapter is not None:
        before = kept_evaluation(config, inputs, report.base_fingerprint)
    for name, held_out in inputs.describe().items():
        console.say(f"held out, {name}: {held_out}")
    print_measures(console, report, before, full)
    lines = []
    trained = None if args.adapter is None else load_adapter(args.adapter).run_dtype
    if trained is not None and trained != config.dtype:
        lines.append(f"dtype: evaluated in {config.dtype}; the adapter's run had {trained}")
    if report.kept:
        lines.append(f"taken over from an earlier evaluation: {', '.join(report.kept)}")
    lines += [
        f"written to {done.folder}, {done.seconds:.0f} s" for done in filter(None, (report, full))
    ]
    if before is not None:
        lines.append(f"comparison: {write_comparison(report, before)}")
    for line in lines:
        console.say(line)


if __name__ == "__main__":
    sys.exit(main(None))
