"""How the weights of a checkpoint are quantised, by `quantization_config` of `config.json`."""

from esft_jax.errors import InputError
from esft_jax.families.keys import Raw, require

_READ = {
    "quant_method",
    "fmt",
    "activation_scheme",
    "scale_fmt",
    "expert_dtype",
    "weight_block_size",
}
# Which weights are in fp8; their types say it. And what another reader makes of them.
_LEFT = {"modules_to_not_convert", "modules_to_convert", "ignored_layers", "dequantize"}


def read_fp8_block(raw: Raw) -> tuple[int, int] | None:
    """Rows and columns of a weight that share a scale; None: weights are not quantised.

    Raises:
        InputError: another quantisation; naming the key.
    """
    found = raw.get("quantization_config")
    if found is None:
        return None
    if not isinstance(found, dict):
        raise InputError(f"quantization_config: {found!r}; expected an object")
    try:
        if found.get("quant_method") != "fp8":
            method = found.get("quant_method")
            raise InputError(f"quant_method: {method!r} is not supported; expected 'fp8'")
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
        for key in sorted(found.keys() - _READ - _LEFT):
            require(found, key, None)
    except InputError as error:
        raise InputError(f"quantization_config.{error}") from None
    return block[0], block[1]
