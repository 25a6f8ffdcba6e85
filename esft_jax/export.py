"""Merge an adapter into its base and write the full model as a Hugging Face folder."""

import sys
from collections.abc import Sequence
from pathlib import Path

from esft_jax.checkpoint.export import export_model
from esft_jax.checkpoint.manifest import RUN_DTYPES
from esft_jax.cli import Parser, command, option
from esft_jax.evaluation.report import figures_of
from esft_jax.processes import use_cpu_only
from esft_jax.values import LocalPath


@command
def main(argv: Sequence[str]) -> None:
    """Run `python -m esft_jax.export`; None stands for the command line."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--base",
        required=True,
        type=option(LocalPath),
        metavar="MODEL",
        help="Hugging Face folder, name on the hub, or converted checkpoint",
    )
    parser.add_argument(
        "--adapter",
        type=option(LocalPath),
        metavar="DIR",
        help="adapter folder (default: the base alone)",
    )
    parser.add_argument(
        "--to", required=True, type=option(LocalPath), metavar="FOLDER", help="new folder to write"
    )
    parser.add_argument(
        "--dtype",
        choices=RUN_DTYPES,
        help="type of all weights (default: the smallest that loses nothing of base and adapter)",
    )
    args = parser.parse_args(argv)
    use_cpu_only()
    figures = [] if args.adapter is None else figures_of(Path(args.adapter))
    export_model(args.base, args.adapter, args.to, args.dtype, figures=figures)
    print(f"Exported {args.base} with {args.adapter or 'no adapter'}; written to {args.to}")


if __name__ == "__main__":
    sys.exit(main(None))
