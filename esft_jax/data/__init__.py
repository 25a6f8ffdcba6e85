"""From files of examples to packed batches: read, tokenize, pack, iterate."""

import importlib
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m esft_jax.data`, see `esft_jax.show_data`; None stands for the command line."""
    # The command uses more than this package, which imports nothing of it.
    exit_code: int = importlib.import_module("esft_jax.show_data").main(argv)
    return exit_code
