"""Say from its scores whether ESFT suits a task: which experts, why, how sure, at what cost.

Writes a page that opens offline, report.html, with its figures as PNG and its numbers as CSV.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from esft_jax.checkpoint.identity import check_same_base, recorded_chat, tokenizer_fingerprint
from esft_jax.checkpoint.load import local_folder
from esft_jax.cli import Parser, command, option
from esft_jax.data.tokenizer import Tokenizer
from esft_jax.errors import InputError
from esft_jax.families import load_model_config
from esft_jax.files import (
    check_no_links,
    check_writable,
    visible,
    write_bytes_atomic,
    write_text_atomic,
)
from esft_jax.model.config import ModelConfig
from esft_jax.reporting.comparison import read_comparison, verdict
from esft_jax.reporting.cost import CostModel
from esft_jax.reporting.figures import draw_figures, to_png, to_svg
from esft_jax.reporting.findings import Findings, answers, find
from esft_jax.reporting.page import render_page
from esft_jax.reporting.tables import tables, to_csv
from esft_jax.reporting.tasks import Named, read_arguments, read_tasks
from esft_jax.reporting.vocabulary import load_tokenizer
from esft_jax.routing.scores import SCORE_METHODS
from esft_jax.sweeping.table import MethodRow
from esft_jax.sweeping.table import to_csv as methods_csv
from esft_jax.terminal import Terminal
from esft_jax.values import Count, LocalPath, Share

PAGE = "report.html"
# Tables and figures, by the names of their files; what else lies beside them is the user's.
_OURS = re.compile(
    r"concentration|experts(-\d+)?|layers|methods|overlap|sample-size|scores|threshold|words"
)

_MODEL_FILES = ("config.json", "tokenizer*", "special_tokens*")


@command
def main(argv: Sequence[str]) -> None:
    """Run `python -m esft_jax.report`; None stands for the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "scores",
        nargs="+",
        metavar="[NAME=]PATH",
        help="one per task: a run's folder, what `score` wrote, a reference summary.json, or a "
        "folder of routing logs",
    )
    parser.add_argument(
        "--output", required=True, type=option(LocalPath), metavar="FOLDER", help="where to write"
    )
    parser.add_argument(
        "--method", choices=SCORE_METHODS, help="(default: as the run did, else token)"
    )
    parser.add_argument(
        "--top-p",
        type=option(Share),
        metavar="P",
        help="threshold, as of `select` (default: the experts that the run trained, else as there)",
    )
    parser.add_argument(
        "--model",
        type=option(LocalPath),
        metavar="FOLDER",
        help="the model's config.json adds costs, its tokenizer adds words; no weights are read "
        "(default: that of the runs)",
    )
    parser.add_argument(
        "--sequence-length",
        type=option(Count),
        metavar="TOKENS",
        help="of a row in training, for its operations (default: that of the runs, else 4096)",
    )
    parser.add_argument(
        "--experts-per-token",
        type=option(Count),
        default=6,
        metavar="K",
        help="of scores that do not say it; --model does (default: 6)",
    )
    parser.add_argument(
        "--sweep",
        type=option(LocalPath),
        metavar="FILE",
        help="configuration of a sweep; adds what it has found so far",
    )
    args = parser.parse_args(argv)

    arguments = read_arguments(args.scores)
    model, costs, tokenizer = args.model, None, None
    if model is None:
        model = _model_of_runs(arguments)
    if model is not None:
        folder = local_folder(model, _MODEL_FILES)
        length = args.sequence_length or _length_of_runs(arguments)
        costs, tokenizer = CostModel(load_model_config(folder), length), load_tokenizer(folder)
    router = None if costs is None else costs.config.router
    tasks = read_tasks(
        arguments,
        args.experts_per_token if router is None else router.top_k,
        None if router is None else router.num_experts,
    )
    if costs is not None:
        here = {"config_fingerprint": costs.config.fingerprint}
        if tokenizer is not None:
            here["tokenizer_fingerprint"] = tokenizer_fingerprint(folder, tokenizer)
        for task in tasks:
            provenance, chats = task.scores.provenance, here
            if "chat" in provenance and tokenizer is not None:
                own = Tokenizer.load(folder, recorded_chat(provenance, str(task.source)))
                chats = here | {"tokenizer_fingerprint": tokenizer_fingerprint(folder, own)}
            check_same_base(provenance, chats, task.source, "measured on")
    known = {task.log.top_k for task in tasks if task.log is not None}
    if router is not None:
        known.add(router.top_k)
    if len(known) > 1:
        raise InputError(f"experts per token: {sorted(known)} in one report; expected one model")
    top_k = known.pop() if known else args.experts_per_token
    if not 1 <= top_k <= tasks[0].scores.num_experts:
        raise InputError(
            f"--experts-per-token: {top_k}; expected a number from 1 to the "
            f"{tasks[0].scores.num_experts} experts of a layer"
        )
    check_writable(args.output, "--output")
    for part in ("data", "figures"):
        check_no_links(Path(args.output) / part)
    if (Path(args.output) / PAGE).is_dir():
        raise InputError(f"--output: {Path(args.output) / PAGE} is a folder; expected a file")
    compared = () if args.sweep is None else read_comparison(args.sweep)
    findings = find(tasks, args.method, args.top_p, top_k, costs, tokenizer, model)
    write_report(findings, Path(args.output), compared)
    terminal = Terminal()
    print_summary(findings, terminal)
    if compared:
        terminal.say(verdict(compared))
    terminal.say(f"report: {Path(args.output) / PAGE}")


def _model_of_runs(arguments: Sequence[Named]) -> str | None:
    """The model of all runs; None without any, or where it is not there any more.

    Raises:
        InputError: they have different ones.
    """
    found: list[tuple[Named, str, ModelConfig]] = []
    for named in arguments:
        if named.run is None:
            continue
        name = named.run.config.model
        try:
            folder = local_folder(name, _MODEL_FILES)
        except InputError as error:
            print(
                f"{named.path}: the run's model is not there ({error}): without --model, no costs "
                "and no words",
                file=sys.stderr,
            )
            continue
        found.append((named, name, load_model_config(folder)))
    for named, name, shape in found:
        first, other, expected = found[0]
        if shape != expected:
            raise InputError(
                f"{named.path}: a run of {name}, another model than {other} of {first.path}; "
                "expected runs of one model"
            )
    return found[0][1] if found else None


def _length_of_runs(arguments: Sequence[Named]) -> int:
    lengths = {named.run.config.data.sequence_length for named in arguments if named.run}
    return lengths.pop() if len(lengths) == 1 else 4096


def write_report(findings: Findings, folder: Path, compared: Sequence[MethodRow] = ()) -> None:
    """Write `data/*.csv`, `figures/*.png` and, last, `report.html`; an earlier report goes."""
    kept = [*visible(folder / "data", "*.csv"), *visible(folder / "figures", "*.png")]
    for stale in [folder / PAGE, *(path for path in kept if _OURS.fullmatch(path.stem))]:
        stale.unlink(missing_ok=True)
    for name, table in tables(findings).items():
        write_text_atomic(folder / "data" / f"{name}.csv", to_csv(table))
    if compared:
        write_text_atomic(folder / "data" / "methods.csv", methods_csv(compared))
    figures = draw_figures(findings, compared)
    for name, figure in figures.items():
        write_bytes_atomic(folder / "figures" / f"{name}.png", to_png(figure))
    drawn = {name: to_svg(figure, name) for name, figure in figures.items()}
    page = render_page(findings, drawn, compared)
    write_text_atomic(folder / PAGE, page)


def print_summary(findings: Findings, console: Terminal) -> None:
    """The answers for each task, and how much the tasks have in common."""
    for index, choice in enumerate(findings.choices):
        found = answers(findings, index)
        table = Table(title=choice.task.name, title_justify="left", show_header=False)
        table.add_column(no_wrap=True)
        table.add_column()
        table.add_row("fit", found.fit)
        table.add_row("which", found.which)
        table.add_row("why", found.why)
        table.add_row("how sure", found.sure)
        table.add_row("cost", found.cost)
        console.print(table)
    if findings.overlap is not None:
        names = [c.task.name for c in findings.choices if c.halves is not None]
        table = Table(
            f"shared top {findings.top_k} (chance {findings.chance:.2f})",
            *names,
            title_justify="left",
        )
        for name, row in zip(names, findings.overlap, strict=True):
            table.add_row(name, *(f"{value:.2f}" for value in row))
        console.print(table)


if __name__ == "__main__":
    sys.exit(main(None))
