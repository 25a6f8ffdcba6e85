"""Adafactor's scaling of gradients (arXiv 1804.04235), for parameters that are stacks of matrices.

Optax's takes the two largest axes of an array for the sides of a matrix, which in a bank may be its
rows; and clips an array as a whole. Here each matrix of a stack is on its own.

Letters: I and O, the sides of a matrix.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from esft_jax.adapt.partition import is_matrix
from esft_jax.training.rounding import is_variable

# Of the paper, and of optax: how the decay of moments approaches 1, what is added to squares, and
# how large the root mean square of an update may be.
_DECAY_EXPONENT, _ADDED, _LARGEST = 0.8, 1e-30, 1.0


class FactoredState(NamedTuple):
    """Second moments.

    Attributes:
        updates: made so far.
        rows: of matrices, means over their columns, `[*, I]`.
        columns: of matrices, means over their rows, `[*, O]`.
        whole: those of vectors.
    """

    updates: Int[Array, ""]
    rows: Any
    columns: Any
    whole: Any


def scale_by_factored_rms() -> optax.GradientTransformation:
    """Gradients over the root of their second moments, of which rows and columns are kept."""

    def init(params: optax.Params) -> FactoredState:
        def zeros(param: nnx.Variable, axis: int | None) -> nnx.Variable:
            """Moments of a matrix without an axis; of a vector whole, with None."""
            if is_matrix(param) == (axis is None):
                return param.replace(optax.MaskedNode())
            value, axes = param.get_value(), list(param.axes)
            shape = list(value.shape)
            if axis is not None:
                del shape[axis], axes[axis]
            return param.replace(jnp.zeros(shape, value.dtype), axes=tuple(axes))

        def of(axis: int | None) -> Any:
            return jax.tree.map(lambda param: zeros(param, axis), params, is_leaf=is_variable)

        return FactoredState(jnp.zeros((), jnp.int32), of(-1), of(-2), of(None))

    def update(
        grads: optax.Updates, state: FactoredState, _: optax.Params | None = None
    ) -> tuple[optax.Updates, FactoredState]:
        made = optax.safe_increment(state.updates)
        decay = 1 - made.astype(jnp.float32) ** -_DECAY_EXPONENT

        def scale(grad: nnx.Variable, *moments: nnx.Variable) -> tuple[nnx.Variable, ...]:
            rows, columns, whole = (moment.get_value() for moment in moments)
            found = _scaled(grad.get_value(), rows, columns, whole, decay)
            kept = zip((grad, *moments), found, strict=True)
            return tuple(variable.replace(value) for variable, value in kept)

        leaves, structure = jax.tree.flatten(grads, is_leaf=is_variable)
        moments = (
            jax.tree.leaves(kind, is_leaf=is_variable)
            for kind in (state.rows, state.columns, state.whole)
        )
        scaled = zip(*map(scale, leaves, *moments), strict=True)
        updates, rows, columns, whole = (jax.tree.unflatten(structure, part) for part in scaled)
        return updates, FactoredState(made, rows, columns, whole)

    return optax.GradientTransformation(init, update)


def _scaled(
    grad: Float[Array, "*S"], rows: Any, columns: Any, whole: Any, decay: Float[Array, ""]
) -> tuple[Float[Array, "*S"], Any, Any, Any]:
    """A scaled gradient and the new moments, of which those that are not kept are masked."""

    def moved(moment: Float[Array, "*T"], squares: Float[Array, "*T"]) -> Float[Array, "*T"]:
        return decay * moment + (1 - decay) * squares

    squares = grad * grad + _ADDED
    sides: tuple[int, ...] = (-1,)
    if isinstance(whole, optax.MaskedNode):
        sides = (-2, -1)
        rows, columns = moved(rows, squares.mean(-1)), moved(columns, squares.mean(-2))
        row_factor = jax.lax.rsqrt(rows / rows.mean(-1, keepdims=True))
        scaled = grad * row_factor[..., None] * jax.lax.rsqrt(columns)[..., None, :]
    else:
        whole = moved(whole, squares)
        scaled = grad * jax.lax.rsqrt(whole)
    size = jnp.sqrt((scaled * scaled).mean(sides, keepdims=True))
    return scaled / jnp.maximum(1, size / _LARGEST), rows, columns, whole
