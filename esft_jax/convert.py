"""Convert a Hugging Face checkpoint to a sharded Orbax checkpoint that every device reads in part.

Memory holds a few tensors at a time. A conversion that was interrupted goes on where it stopped
when the same command is run again. Several processes that see the same folders share the work.
"""

import sys
from collections.abc import Sequence

import jax

from esft_jax.checkpoint.convert import convert_checkpoint
from esft_jax.checkpoint.load import local_folder
from esft_jax.checkpoint.quantise import quantise_converted
from esft_jax.cli import (
    Parser,
    add_process_arguments,
    command,
    join_processes,
    option,
    quantisation,
)
from esft_jax.errors import InputError
from esft_jax.processes import use_cpu_only
from esft_jax.values import LocalPath


@command
def main(argv: Sequence[str]) -> None:
    """Run `python -m esft_jax.convert`; None stands for the command line."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--from",
        dest="source",
        type=option(LocalPath),
        metavar="MODEL",
        help="Hugging Face folder, or a name on the hub; not needed for --quantise, if --to is "
        "converted already",
    )
    parser.add_argument(
        "--to", required=True, type=option(LocalPath), metavar="FOLDER", help="new folder to write"
    )
    parser.add_argument(
        "--quantise",
        type=quantisation,
        action="append",
        default=[],
        metavar="KEY=VALUE,...",
        help="keep matrices quantised beside those in full precision, by the keys of the section "
        "quantise of a configuration, such as experts=int4,rest=int8,group_size=64; may be given "
        "several times, and for a folder that is converted already",
    )
    add_process_arguments(parser)
    args = parser.parse_args(argv)
    if args.source is None and not args.quantise:
        raise InputError("--from: missing; expected a Hugging Face folder, or a name on the hub")
    use_cpu_only()
    join_processes(args)
    if args.source is None:
        for how in args.quantise:
            quantise_converted(args.to, how)
        done = f"Quantised {args.to}"
    else:
        folder = local_folder(args.source)
        fingerprint = convert_checkpoint(folder, args.to, args.source, args.quantise)
        done = f"Converted {args.source}; written to {args.to}, fingerprint {fingerprint}"
    if jax.process_index() == 0:
        print(done)


if __name__ == "__main__":
    sys.exit(main(None))
