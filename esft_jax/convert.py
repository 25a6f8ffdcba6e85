"""Convert a Hugging Face checkpoint to a sharded Orbax checkpoint that every device reads in part.

Memory holds one tensor at a time. A conversion that was interrupted goes on where it stopped when
the same command is run again.
"""

import argparse
import sys
from collections.abc import Sequence

from esft_jax.cli import command
from esft_jax.hf.convert import convert_checkpoint
from esft_jax.hf.load import local_folder


@command
def main(argv: Sequence[str] | None) -> None:
    """Run `python -m esft_jax.convert`; None stands for the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--from",
        dest="source",
        required=True,
        metavar="MODEL",
        help="Hugging Face folder, or a name on the hub",
    )
    parser.add_argument("--to", required=True, metavar="FOLDER", help="new folder to write")
    args = parser.parse_args(argv)
    fingerprint = convert_checkpoint(local_folder(args.source), args.to, origin=args.source)
    print(f"Converted {args.source}; written to {args.to}, fingerprint {fingerprint}")


if __name__ == "__main__":
    sys.exit(main(None))
