"""Let a model complete tasks' prompts, judge the completions, and measure held-out losses."""

import sys
from collections.abc import Sequence

import jax

from esft_jax.checkpoint.adapter import load_adapter
from esft_jax.cli import Parser, add_config_arguments, command, open_config, option
from esft_jax.config import RunConfig
from esft_jax.errors import InputError
from esft_jax.evaluation.report import print_measures, write_comparison
from esft_jax.evaluation.run import (
    EvaluationInputs,
    EvaluationReport,
    check_evaluation,
    evaluate_in_full_precision,
    kept_evaluation,
    run_evaluations,
)
from esft_jax.terminal import Terminal, first_line
from esft_jax.values import LocalPath


@command
def main(argv: Sequence[str]) -> None:
    """Run `python -m esft_jax.evaluate`; None stands for the command line."""
    parser = Parser(description=__doc__)
    add_config_arguments(parser)
    parser.add_argument(
        "--adapter",
        type=option(LocalPath),
        action="append",
        metavar="DIR",
        help="adapter folder (default: the base alone); may be given several times, of one base",
    )
    args = parser.parse_args(argv)
    config = open_config(args)
    console = Terminal(quiet=jax.process_index() != 0)
    inputs = check_evaluation(config)
    adapters: list[str | None] = args.adapter or [None]
    if len({*adapters}) < len(adapters):
        raise InputError("--adapter: one is given twice; expected each once")
    beside = f" with {', '.join(args.adapter)}" if args.adapter else ""
    console.say(first_line(f"evaluate {config.model}{beside}", config.dtype))
    reports = run_evaluations(config, adapters, inputs)
    for number, (adapter, report) in enumerate(zip(adapters, reports, strict=True)):
        full = None
        if adapter is not None:
            full = evaluate_in_full_precision(config, adapter, inputs, console.say)
        if jax.process_index() != 0:
            continue
        if number == 0:
            for name, held_out in inputs.describe().items():
                console.say(f"held out, {name}: {held_out}")
        if len(adapters) > 1:
            console.say(f"{adapter}:")
        _print(console, config, inputs, adapter, report, full)


def _print(
    console: Terminal,
    config: RunConfig,
    inputs: EvaluationInputs,
    adapter: str | None,
    report: EvaluationReport,
    full: EvaluationReport | None,
) -> None:
    """What was found of an adapter, or of the base alone."""
    before = None
    if adapter is not None:
        before = kept_evaluation(config, inputs, report.base_fingerprint)
    print_measures(console, report, before, full)
    lines = []
    trained = None if adapter is None else load_adapter(adapter).run_dtype
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
