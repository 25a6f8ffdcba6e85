"""Products with a module's weights.

Letters: in and out, the sides of a weight.
"""

from typing import Any

from jaxtyping import Array, Float


def project(x: Float[Array, "... in"], module: Any, name: str) -> Float[Array, "... out"]:
    """Product with a module's weight of this name, with its bias and its factors if it has them."""
    out = x @ getattr(module, name)[...].astype(x.dtype)
    bias = getattr(module, f"{name}_bias", None)
    if bias is not None:
        out += bias[...].astype(x.dtype)
    update = module.lora.get(name)
    return out if update is None else out + update(x)
