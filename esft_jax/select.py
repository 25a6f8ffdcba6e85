"""Select the experts to train from their scores and write `expert_cfg.json`."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import get_args

import numpy as np
from rich.table import Table

from esft_jax.adapt.expert_config import ExpertConfig
from esft_jax.adapt.parts import PARTS
from esft_jax.checkpoint.load import local_folder
from esft_jax.cli import Parser, command, option
from esft_jax.errors import InputError
from esft_jax.families import load_model_config
from esft_jax.routing.choose import check_select, choose_experts, describe, load_tasks
from esft_jax.routing.scores import SCORE_METHODS, ExpertScores
from esft_jax.selection_config import DEFAULT_TOP_P, Allocation, SelectConfig
from esft_jax.terminal import Terminal
from esft_jax.values import Count, LocalPath, Seed, Share, Size


@command
def main(argv: Sequence[str]) -> None:
    """Run `python -m esft_jax.select`; None stands for the command line."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--scores",
        required=True,
        nargs="+",
        type=option(LocalPath),
        metavar="PATH",
        help="folder or file of `score`, a reference summary.json, a folder of routing logs, or an "
        "expert_cfg.json; several, for several tasks",
    )
    parser.add_argument(
        "--output",
        required=True,
        type=option(LocalPath),
        metavar="FILE",
        help="expert_cfg.json to write",
    )
    parser.add_argument("--method", choices=SCORE_METHODS, default="token", help="(default: token)")
    rule = parser.add_argument_group("how many experts (one of these)")
    rule.add_argument(
        "--top-p",
        type=option(Share),
        metavar="P",
        help=f"sum of scores to reach in each layer (default: {DEFAULT_TOP_P['token']}; for gate "
        f"{DEFAULT_TOP_P['gate']})",
    )
    rule.add_argument("--top-k", type=option(Count), metavar="N", help="experts in every layer")
    rule.add_argument(
        "--max-parameters",
        type=option(Size),
        metavar="N",
        help="at most N trained parameters",
    )
    rule.add_argument(
        "--max-bytes", type=option(Size), metavar="N", help="the same, by the adapter's size"
    )
    parser.add_argument(
        "--allocation",
        choices=get_args(Allocation),
        default="global",
        help="how a budget is divided: the best of all layers, as many in each, or those of the "
        "largest p that it allows (default: global)",
    )
    parser.add_argument(
        "--group-size", type=option(Count), default=1, metavar="N", help="select in groups"
    )
    parser.add_argument(
        "--groups-from", type=option(LocalPath), metavar="PATH", help="scores or logs to group by"
    )
    parser.add_argument(
        "--combine", choices=("union", "intersection"), default="union", help="(default: union)"
    )
    parser.add_argument(
        "--random-seed",
        type=option(Seed),
        metavar="SEED",
        help="as many random experts in each layer",
    )
    parser.add_argument(
        "--also",
        nargs="+",
        choices=tuple(PARTS),
        default=[],
        metavar="PART",
        help=f"what else is trained, some of {', '.join(PARTS)}",
    )
    parser.add_argument(
        "--model",
        type=option(LocalPath),
        metavar="FOLDER",
        help="of the base, for a budget or a check",
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="of the adapter, for --max-bytes (default: bfloat16)",
    )
    parser.add_argument(
        "--experts-per-token",
        type=option(Count),
        default=6,
        metavar="K",
        help="experts per token of routing logs, which do not say it; --model does (default: 6)",
    )
    args = parser.parse_args(argv)

    select = _select_config(args)
    model = None
    if args.model is not None:
        model = load_model_config(local_folder(args.model, files=("config.json",)))
        check_select(select, model, args.dtype)
    tasks = load_tasks(args.scores, model, args.experts_per_token)
    config = choose_experts(select, tasks, model, args.dtype, args.experts_per_token)
    config.save(args.output)
    console = Terminal()
    scored = [
        (path, task)
        for path, task in zip(args.scores, tasks, strict=True)
        if isinstance(task, ExpertScores)
    ]
    for path, task in scored:
        if len(tasks) > 1:
            console.say(f"{path}:")
        print_selection(task, config, console)
    how = describe(select, scored=bool(scored))
    console.say(f"{config.num_experts_selected} experts by {how}; written to {args.output}")


def _select_config(args: argparse.Namespace) -> SelectConfig:
    names = [field.name for field in dataclasses.fields(SelectConfig) if hasattr(args, field.name)]
    values = {name: getattr(args, name) for name in names}
    select = SelectConfig(**values | {"scores": tuple(args.scores), "also": tuple(args.also)})
    if problem := select.problem():
        raise InputError(problem)
    return select


def print_selection(scores: ExpertScores, config: ExpertConfig, console: Terminal) -> None:
    """Print the experts of each layer and what they cover of the task's routing."""
    table = Table("layer", "experts, best first")
    kind = scores.gate_method
    for title in ("count", "token share", "gate mass" if kind == "gate" else "gate share"):
        table.add_column(title, justify="right")
    covered = []
    for row, layer in enumerate(scores.layers):
        ids = list(config.experts.get(layer, ()))
        gates = scores.of(kind)[row, ids].sum()
        covered.append((len(ids), scores.token[row, ids].sum(), gates))
        table.add_row(str(layer), " ".join(map(str, ids)), *_cells(*covered[-1]))
    table.add_section()
    count, token, gate = np.sum(covered, axis=0)
    layers = len(scores.layers)
    share = count / scores.token.size
    summary = f"{share:.1%} of {scores.token.size} experts, mean cover"
    table.add_row("all", summary, *_cells(count, token / layers, gate / layers))
    console.print(table)
    whole = [layer for layer, ids in config.experts.items() if len(ids) == scores.num_experts]
    if whole:
        names = ", ".join(map(str, whole))
        console.say(f"Note: this takes every expert of layer {names}")


def _cells(count: float, token: float, gate: float) -> tuple[str, str, str]:
    return f"{count:.0f}", f"{token:.1%}", f"{gate:.3f}"


if __name__ == "__main__":
    sys.exit(main(None))
