"""Measure how relevant each expert is to a task: run the base model over samples of its data."""

import dataclasses
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import jax

from esft_jax.cli import Parser, add_config_arguments, command, open_config, option
from esft_jax.errors import InputError
from esft_jax.files import check_writable
from esft_jax.processes import on_first_process
from esft_jax.routing.choose import choose_experts, describe
from esft_jax.select import print_selection
from esft_jax.terminal import Terminal, first_line
from esft_jax.training.choosing import measure_scores
from esft_jax.training.fit import check_rows
from esft_jax.training.rows import general_rows, score_rows
from esft_jax.training.run_folder import RunFolder
from esft_jax.training.setup import Setup, open_setup
from esft_jax.values import LocalPath


@command
def main(argv: Sequence[str]) -> None:
    """Run `python -m esft_jax.score`; None stands for the command line."""
    parser = Parser(description=__doc__)
    add_config_arguments(parser)
    parser.add_argument(
        "--output",
        type=option(LocalPath),
        metavar="FOLDER",
        help="where to write (default: scores/ in the run's folder)",
    )
    args = parser.parse_args(argv)
    config = open_config(args)
    if "contrast" in config.further_scores and not config.score.general:
        raise InputError("score.general: contrast compares with it; expected files of a sample")
    folder = Path(args.output) if args.output else RunFolder(config.output).scores
    check_writable(folder, "--output" if args.output else "output")
    console = Terminal(quiet=jax.process_index() != 0)
    console.say(first_line(f"score the experts of {config.model}", config.dtype))
    setup = open_setup(config)
    if setup.base.source is None:
        raise InputError("init: random weights have no experts to score; expected pretrained")
    length = config.score.sequence_length  # a run that is given its experts need not have it right
    check_rows(setup.base.config, {"score": length})
    rows = score_rows(setup.task_set, length, config.data, setup.tokenizer, config.seed)
    general = general_rows(config.score, config.data, setup.tokenizer, config.seed)
    setup = dataclasses.replace(setup, score_set=rows, general_set=general)
    with ExitStack() as stack:
        if not args.output:
            on_first_process(lambda: stack.enter_context(setup.run.owned()), "output")
        _score(setup, folder, console)


def _score(setup: Setup, folder: Path, console: Terminal) -> None:
    config = setup.config
    scores = measure_scores(setup, setup.load_base())
    if jax.process_index() == 0:
        scores.save(folder)
        # Of these scores, whatever the configuration will train on.
        select = dataclasses.replace(config.select, scores=())
        chosen = choose_experts(select, [scores], setup.base.config, config.dtype)
        assert setup.score_set is not None
        console.say(setup.score_set.describe())
        if setup.general_set is not None:
            console.say(f"general sample: {setup.general_set.describe()}")
        console.say(
            f"{scores.provenance['samples']} samples, {scores.provenance['tokens']:,} tokens; "
            f"a choice by {describe(select)}:"
        )
        print_selection(scores, chosen, console)
        console.say(f"scores: {folder}")


if __name__ == "__main__":
    sys.exit(main(None))
