"""Fine-tune a model as one YAML file says: score, select, train, evaluate, save an adapter."""

import dataclasses
import datetime
import signal
import sys
from collections.abc import Sequence

import jax
from rich.table import Table

from esft_jax.cli import Parser, add_config_arguments, command, open_config
from esft_jax.config import RunConfig
from esft_jax.evaluation.report import measures, print_measures, write_comparison
from esft_jax.evaluation.run import (
    OWN,
    EvaluationInputs,
    EvaluationReport,
    check_evaluation,
    evaluate_in_full_precision,
    evaluate_result,
    run_evaluation,
)
from esft_jax.huge_pages import restart_with_huge_pages
from esft_jax.processes import on_first_process
from esft_jax.terminal import Terminal, first_line
from esft_jax.training.loggers import check_trackers
from esft_jax.training.loop import run_training
from esft_jax.training.preemption import watch_preemption
from esft_jax.training.result import RunResult, write_card
from esft_jax.training.run_folder import RunFolder
from esft_jax.training.setup import Setup, open_setup, own_run
from esft_jax.training.signals import exit_on_signals


@command
def main(argv: Sequence[str]) -> None:
    """Run `python -m esft_jax.train`; None stands for the command line."""
    parser = Parser(description=__doc__)
    add_config_arguments(parser)
    parser.add_argument(
        "--preemption-notices",
        action="store_true",
        help="on a Spot VM of Google Cloud, save and exit when its metadata server announces the "
        "end",
    )
    args = parser.parse_args(argv)
    config = open_config(args)
    console = Terminal(quiet=jax.process_index() != 0)
    with exit_on_signals(console.say):
        if args.preemption_notices:
            watch_preemption()
        _train(config, console)


def _train(config: RunConfig, console: Terminal) -> None:
    console.say(first_line(_doing(config), config.dtype))
    check_trackers(config.train.log_to)
    setup = open_setup(config)
    inputs = check_evaluation(config) if config.evaluation.asked else None
    with own_run(setup):
        _run(setup, inputs, console)


def _doing(config: RunConfig) -> str:
    first, *others = config.data.train
    data = first + (f" and {len(others)} more" if others else "")
    done = RunFolder(config.output).last_step()
    where = f"into {config.output}" if done is None else f"from step {done} of {config.output}"
    return f"train {config.model} by {config.method} on {data}, {where}"


def _run(setup: Setup, inputs: EvaluationInputs | None, console: Terminal) -> None:
    config, before = setup.config, None
    if inputs is not None:
        for name, held_out in inputs.describe().items():
            if name != OWN:  # the run describes its own data
                console.say(f"held out, {name}: {held_out}")
    if inputs is not None and config.init == "pretrained":
        before = run_evaluation(config, None, inputs)
    result = run_training(setup, say=console.say)
    if result.result is None:
        console.say(f"Stopped at step {result.step} and saved; the same command continues the run.")
        if result.stopped_by == signal.SIGINT:
            raise KeyboardInterrupt
        return
    if inputs is not None:
        after = evaluate_result(config, result.result, inputs)
        full = evaluate_in_full_precision(config, result.result, inputs, console.say)
        print_measures(console, after, before, full)
        if before is not None:
            _write_comparison(console, after, before)
        figures = [dataclasses.asdict(measure) for measure in measures(after, before)]
        on_first_process(lambda: write_card(setup, result, figures), "model card")
    _print_summary(console, result)


def _write_comparison(console: Terminal, after: EvaluationReport, before: EvaluationReport) -> None:
    def write() -> None:
        path = write_comparison(after, before)
        console.say(f"comparison: {path}")

    on_first_process(write, "comparison")


def _print_summary(console: Terminal, result: RunResult) -> None:
    table = Table(show_header=False)
    if result.valid_loss is not None:
        table.add_row("validation loss, nats per token", f"{result.valid_loss:.4f}")
    if result.experts is not None:
        table.add_row("experts trained", str(result.experts.num_experts_selected))
    share = result.trained / result.total
    table.add_row("parameters trained", f"{result.trained:,} of {result.total:,} ({share:.2%})")
    table.add_row("step kept", str(result.step))
    table.add_row("training, seconds", f"{result.seconds:.0f}")
    timing = result.timing
    if timing.step is not None:
        step = timing.step
        times = f"{step.p50:.3g}, {step.p90:.3g}, {step.p99:.3g}, {step.max:.3g}"
        table.add_row("step, seconds: p50, p90, p99, max", times)
    elapsed = datetime.timedelta(seconds=round(timing.elapsed))
    table.add_row("goodput", f"{timing.goodput:.0%} of {elapsed} since the first start")
    console.print(table)
    assert result.result is not None
    console.say(f"{result.result.name}: {result.result}")


if __name__ == "__main__":
    restart_with_huge_pages()
    sys.exit(main(None))
