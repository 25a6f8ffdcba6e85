"""Evaluate a model, alone or with an adapter, by EleutherAI's lm-evaluation-harness.

This is its command `lm-eval run` with one more kind of model, `esft_jax`, as the default:

    python -m esft_jax.harness --model_args pretrained=MODEL,adapter=DIR --tasks arc_easy

`EsftJaxLM` lists the arguments of the model.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any

from esft_jax import strict_yaml
from esft_jax.cli import command
from esft_jax.errors import InputError

# Unless the command line or the harness's own configuration says otherwise.
_DEFAULTS = {"model": "esft_jax", "batch_size": 16}


@command
def main(argv: Sequence[str]) -> None:
    """Run `python -m esft_jax.harness`; None stands for the command line."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ModuleNotFoundError as error:
        raise InputError(
            f"the harness needs {error.name}; expected an installation with the extra `harness`"
        ) from error
    importlib.import_module("esft_jax.evaluation.lm_eval_model")  # registers the model
    given = _configuration(argv)
    defaults = [f"--{key}={value}" for key, value in _DEFAULTS.items() if key not in given]
    before = sys.argv
    # The command of the library reads the command line; what comes later in it counts.
    sys.argv = [before[0], "run", *defaults, *argv]
    try:
        cli_evaluate()
    finally:
        sys.argv = before


def _configuration(arguments: Sequence[str]) -> dict[str, Any]:
    """The harness's own configuration; the command line, defaults included, would override it."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--config", "-C")
    path = parser.parse_known_args(arguments)[0].config
    return {} if path is None else strict_yaml.read_mapping(path)


if __name__ == "__main__":
    sys.exit(main(None))
