"""Select the experts to train from their scores and write `expert_cfg.json`."""

import argparse
import sys
from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.table import Table

from esft_jax.cli import command
from esft_jax.experts.expert_config import ExpertConfig
from esft_jax.experts.scores import SCORE_METHODS, ExpertScores, load_scores
from esft_jax.experts.select import DEFAULT_TOP_P, select_experts


@command
def main(argv: Sequence[str] | None) -> None:
    """Run `python -m esft_jax.select`; None stands for the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--scores",
        required=True,
        metavar="PATH",
        help="folder or file of `score`, a reference summary.json, or a folder of routing logs",
    )
    parser.add_argument("--method", choices=SCORE_METHODS, default="token", help="(default: token)")
    parser.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="sum of scores to reach in each layer (default: "
        + ", ".join(f"{top_p} for {method}" for method, top_p in DEFAULT_TOP_P.items())
        + ")",
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="expert_cfg.json to write")
    parser.add_argument("--train-shared-experts", action="store_true")
    parser.add_argument("--train-non-expert-modules", action="store_true")
    parser.add_argument(
        "--experts-per-token",
        type=int,
        default=6,
        metavar="K",
        help="experts per token of routing logs, which do not say it (default: 6)",
    )
    args = parser.parse_args(argv)

    scores = load_scores(args.scores, experts_per_token=args.experts_per_token)
    top_p = DEFAULT_TOP_P[args.method] if args.top_p is None else args.top_p
    config = select_experts(
        scores, args.method, top_p, args.train_shared_experts, args.train_non_expert_modules
    )
    config.save(args.output)
    print_selection(scores, config, Console())
    print(f"Selected by {args.method} score, p = {top_p:g}; written to {args.output}")


def print_selection(scores: ExpertScores, config: ExpertConfig, console: Console) -> None:
    """Print the experts of each layer and what they cover of the task's routing."""
    table = Table("layer", "experts, best first")
    for title in ("count", "token share", "gate mass"):
        table.add_column(title, justify="right")
    covered = []
    for row, layer in enumerate(scores.layers):
        ids = list(config.experts.get(layer, ()))
        covered.append((len(ids), scores.token[row, ids].sum(), scores.gate[row, ids].sum()))
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
        console.print(f"Note: p takes every expert of layer {names}")


def _cells(count: float, token: float, gate: float) -> tuple[str, str, str]:
    return f"{count:.0f}", f"{token:.1%}", f"{gate:.3f}"


if __name__ == "__main__":
    sys.exit(main(None))
