"""How far a result may be from the exact one: one measure and bound for all kernels and devices.

Letters: M and N the last two axes of a result.
"""

import math

import numpy as np
from jax import numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float

# A kernel computes tiles of at least so many rows and columns; errors are measured over blocks of
# this size, so that a wrong tile is not hidden by right ones.
BLOCK = 16
# Where a block's exact numbers are much smaller than those of the whole result, by cancellation or
# by little weight, errors are measured against this share of the latter.
LEAST = 1 / 8
# One rounding to a type makes a relative error of at most its unit roundoff u, and of 0.4 u as a
# root mean square. 2 u are the roundings of 25 operands and intermediate results together.
ROUNDINGS = 2


def tolerance(dtype: DTypeLike, terms: int) -> float:
    """The largest error (see `error`) of a result that is right.

    Args:
        dtype: the narrowest type that numbers on the way to the result are rounded to.
        terms: of the longest sum on that way. Sums are made in float32, whose roundings grow with
            the root of their number.
    """
    of_sums = math.sqrt(terms) * _roundoff(jnp.float32)
    return ROUNDINGS * (_roundoff(dtype) + of_sums)


def _roundoff(dtype: DTypeLike) -> float:
    return float(jnp.finfo(dtype).eps) / 2


def error(found: Float[np.ndarray, "*_"], exact: Float[np.ndarray, "*_"]) -> float:
    """The largest error of any block, as a root mean square over its exact numbers'; infinity where
    a number is not finite.

    Blocks are of the last two axes; of the last one, if there is only one.
    """
    if not np.all(np.isfinite(found)):
        return math.inf
    whole = math.sqrt(float(np.mean(exact**2)))
    wrong, right = (
        _block_means((a * a).reshape(-1, *_last_two(a.shape)))
        for a in (found.astype(np.float64) - exact, exact)
    )
    scale = np.maximum(np.sqrt(right), LEAST * whole)
    worst = np.sqrt(wrong) / np.where(scale == 0, 1, scale)  # zeros that should be, are
    return float(worst.max(initial=0.0))


def _last_two(shape: tuple[int, ...]) -> tuple[int, int]:
    return (1, shape[0]) if len(shape) == 1 else (shape[-2], shape[-1])


def _block_means(squares: Float[np.ndarray, "_ M N"]) -> Float[np.ndarray, "..."]:
    """Of each block; the last one of an axis has what is left, too."""
    counts = []
    for axis in (1, 2):
        size = squares.shape[axis]
        starts = np.arange(0, max(size - BLOCK, 0) + 1, BLOCK)
        squares = np.add.reduceat(squares, starts, axis=axis)
        counts.append(np.diff(np.append(starts, size)))
    return squares / np.outer(*counts)
