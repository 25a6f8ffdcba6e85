"""Convert a Hugging Face checkpoint to a sharded Orbax checkpoint that every device reads in part.

Memory holds a few tensors at a time. A conversion that was interrupted goes on where it stopped
when the same command is run again. Several processes that see the same folders share the work.
"""

import sys
from collections.abc import Sequence

import jax

from esft_jax.checkpoint.convert import convert_checkpoint
from esft_jax.checkpoint.load import local_folder
from esft_jax.cli import Parser, add_process_arguments, command, join_processes, option
from esft_jax.processes import use_cpu_only
from esft_jax.values import LocalPath


@command
def main(argv: Sequence[str]) -> None:
    """Run `python -m esft_jax.convert`; None stands for the command line."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--from",
        dest="source",
        required=True,
        type=option(LocalPath),
        metavar="MODEL",
        help="Hugging Face folder, or a name on the hub",
    )
    parser.add_argument(
        "--to", required=True, type=option(LocalPath), metavar="FOLDER", help="new folder to write"
    )
    add_process_arguments(parser)
    args = parser.parse_args(argv)
    use_cpu_only()
    join_processes(args)
    fingerprint = convert_checkpoint(local_folder(args.source), args.to, origin=args.source)
    if jax.process_index() == 0:
        print(f"Converted {args.source}; written to {args.to}, fingerprint {fingerprint}")


if __name__ == "__main__":
    sys.exit(main(None))
