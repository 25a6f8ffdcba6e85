"""Evaluate a model, alone or with an adapter, by EleutherAI's lm-evaluation-harness.

This is its command `lm-eval run` with one more kind of model, `esft_jax`, as the default:

    python -m esft_jax.harness --model_args pretrained=MODEL,adapter=DIR --tasks arc_easy

`EsftJaxLM` lists the arguments of the model.
"""

import importlib
import sys
from collections.abc import Sequence

from esft_jax.cli import command
from esft_jax.errors import InputError

# Requests computed together, unless `--batch_size` says otherwise.
_BATCH_SIZE = 16


@command
def main(argv: Sequence[str] | None) -> None:
    """Run `python -m esft_jax.harness`; None stands for the command line."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        from lm_eval.__main__ import cli_evaluate
    except ModuleNotFoundError as error:
        raise InputError(
            f"the harness needs {error.name}; expected an installation with the extra `harness`"
        ) from error
    importlib.import_module("esft_jax.evaluation.lm_eval_model")  # registers the model
    before = sys.argv
    # The command of the library reads the command line; what comes later in it counts.
    sys.argv = [
        before[0],
        "run",
        "--model",
        "esft_jax",
        "--batch_size",
        str(_BATCH_SIZE),
        *arguments,
    ]
    try:
        cli_evaluate()
    finally:
        sys.argv = before


if __name__ == "__main__":
    sys.exit(main(None))
