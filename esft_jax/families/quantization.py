"""How the weights of a checkpoint are quantised, by `quantization_config` of `config.json`."""

from collections.abc import Mapping
from typing import Any

from esft_jax.errors import InputError
from esft_jax.families.keys import Raw, require

# Keys of fp8.
_READ = {
    "quant_method",
    "fmt",
    "activation_scheme",
    "scale_fmt",
    "expert_dtype",
    "weight_block_size",
}
# Which weights are quantised; their types say it. And what another reader makes of them.
_LEFT = {"modules_to_not_convert", "modules_to_convert", "ignored_layers", "dequantize"}


def read_quantization(raw: Raw) -> Mapping[str, Any]:
    """The fields of a `ModelConfig` that say how weights are quantised, if they are.

    Raises:
        InputError: another quantisation; naming the key.
    """
    found = raw.get("quantization_config")
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise InputError(f"quantization_config: {found!r}; expected an object")
    try:
        match found.get("quant_method"):
            case "fp8":
                return {"fp8_block": _read_fp8_block(found)}
            case "mxfp4":
                _refuse_others(found, {"quant_method"})
                return {"mxfp4": True}
        method = found.get("quant_method")
        raise InputError(f"quant_method: {method!r} is not supported; expected 'fp8' or 'mxfp4'")
    except InputError as error:
        raise InputError(f"quantization_config.{error}") from None


def _read_fp8_block(found: Raw) -> tuple[int, int]:
    """Rows and columns of a weight that share a scale."""
    require(found, "fmt", "e4m3", "float8_e4m3fn", None)
    require(found, "activation_scheme", "dynamic")
    require(found, "scale_fmt", "float", "ue8m0", None)
    require(found, "expert_dtype", "fp8", None)
    block = found.get("weight_block_size", [128, 128])
    if (
        not isinstance(block, list | tuple)
        or len(block) != 2
        or not all(type(side) is int and side > 0 for side in block)
    ):
        raise InputError(f"weight_block_size: {block!r} is not supported; expected two sizes")
    _refuse_others(found, _READ)
    return block[0], block[1]


def _refuse_others(found: Raw, read: set[str]) -> None:
    for key in sorted(found.keys() - read - _LEFT):
        require(found, key, None)
