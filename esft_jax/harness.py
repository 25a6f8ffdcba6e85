"""Evaluate a model, alone or with an adapter, by EleutherAI's lm-evaluation-harness.

This is its command `lm-eval run` with one more kind of model, `esft_jax`, as the default:

    python -m esft_jax.harness --model_args pretrained=MODEL,adapter=DIR --tasks arc_easy

`EsftJaxLM` lists the arguments of the model. `--quantise experts=int4,rest=int8` is a short form of
three of them: it holds the base's weights quantised, by the keys of a configuration's `quantise`.
"""

import dataclasses
import importlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from esft_jax import strict_yaml
from esft_jax.cli import Parser, command, quantisation
from esft_jax.errors import InputError
from esft_jax.ops.quantisation import Quantisation

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
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", "-C")
    parser.add_argument("--quantise", type=quantisation)
    own, _ = parser.parse_known_args(argv)
    given = {} if own.config is None else strict_yaml.read_mapping(own.config)
    if own.quantise is not None:
        argv = _with_quantisation(argv, own.quantise, given)
    defaults = [f"--{key}={value}" for key, value in _DEFAULTS.items() if key not in given]
    before = sys.argv
    # The command of the library reads the command line; what comes later in it counts.
    sys.argv = [before[0], "run", *defaults, *argv]
    try:
        cli_evaluate()
    finally:
        sys.argv = before


def _with_quantisation(
    argv: Sequence[str], how: Quantisation, given: Mapping[str, Any]
) -> list[str]:
    """Arguments that the library knows: `--quantise` as arguments of the model.

    Args:
        given: the harness's own configuration.
    """
    if "model_args" in given:
        raise InputError(
            "--quantise: the configuration has model_args, which would be replaced; expected "
            "quantise_experts and so on among them"
        )
    kept = list(argv)
    place = next(i for i, each in enumerate(kept) if each.partition("=")[0] == "--quantise")
    del kept[place : place + 1 + ("=" not in kept[place])]
    named = {f"quantise_{key}": value for key, value in dataclasses.asdict(how).items()}
    text = ",".join(f"{key}={value}" for key, value in named.items() if value is not None)
    return [*kept, "--model_args", text]


if __name__ == "__main__":
    sys.exit(main(None))
