"""Weights that are not finite: of a base, which is of no use, and of a run, which has no result."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool

from esft_jax.checkpoint.model_tensors import model_tensors
from esft_jax.errors import Diverged, InputError
from esft_jax.families import tensor_table
from esft_jax.host_memory import is_on_host, map_layers
from esft_jax.model.transformer import Transformer
from esft_jax.ops.quantised import Quantised


def check_base(model: Transformer, name: str) -> None:
    """Check that all weights of a base are finite. All processes call it together.

    Args:
        name: what the message begins with.

    Raises:
        InputError: naming the tensor.
    """
    damaged = {tuple(map(str, path)) for path in _not_finite(nnx.state(model, nnx.Param))}
    placements = tensor_table(model.config).places
    tensors = [tensor for tensor, place in placements.items() if place.path in damaged]
    for tensor, values in model_tensors(model, tensors, np.float32):
        if not np.isfinite(values).all():
            raise InputError(
                f"{name}: the base has a tensor that is not finite: {tensor}; expected numbers"
            )


def check_result(tuned: nnx.State, step: int, dtype: DTypeLike) -> None:
    """Check that trained parameters are finite. All processes call it together.

    Args:
        step: updates done.
        dtype: that they are written in.

    Raises:
        Diverged: naming the parameter.
    """
    for path in _not_finite(tuned, dtype):
        raise Diverged(
            f"step {step}: the parameter {'.'.join(map(str, path))} is not finite; there is no "
            "result (a lower optimizer.learning_rate, or other data)"
        )


def _not_finite(state: nnx.State, dtype: DTypeLike | None = None) -> list[tuple[Any, ...]]:
    """Paths of parameters with elements that are not finite; with `dtype`, once cast to it."""
    flat = nnx.to_flat_state(state)
    found = jax.device_get(_finite([param.get_value() for _, param in flat], dtype))
    return [path for (path, _), finite in zip(flat, found, strict=True) if not finite]


@partial(jax.jit, static_argnames="dtype")
def _finite(leaves: list[Array | Quantised], dtype: DTypeLike | None) -> list[Bool[Array, ""]]:
    def finite(leaf: Array | Quantised) -> Bool[Array, ""]:
        # What is not finite makes the scale of its group so; codes stand for numbers.
        values = leaf.scales if isinstance(leaf, Quantised) else leaf

        def all_finite(values: Array) -> Array:
            return jnp.isfinite(values.astype(dtype or values.dtype)).all()

        if is_on_host(values):
            return map_layers(all_finite, values).all()
        return all_finite(values)

    return list(map(finite, leaves))
