"""Tiles of matrices in Pallas kernels that Triton compiles."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array


class Part(NamedTuple):
    """A stretch of one axis. Only what lies before `end` counts."""

    start: Array | int
    size: int
    end: Array | np.int32 | int


# Of a matrix in an array of more axes: places in those before its rows, or in those between its
# rows and its columns.
Index = tuple[Array | np.int32, ...]


def _tile(
    ref: jax.Ref, rows: Part, columns: Part, before: Index, between: Index
) -> tuple[Any, Array | None]:
    """A tile of a matrix and the mask of what counts in it, None if all does."""
    mask = None
    for axis, part in enumerate((rows, columns)):
        # A start is a multiple of the size where the end is known before the program runs.
        if not isinstance(part.end, int) or part.end % part.size:
            inside = part.start + jnp.arange(part.size, dtype=jnp.int32) < part.end
            inside = jnp.broadcast_to(jnp.expand_dims(inside, 1 - axis), (rows.size, columns.size))
            mask = inside if mask is None else mask & inside
    of_rows, of_columns = (pl.ds(part.start, part.size) for part in (rows, columns))
    return ref.at[(*before, of_rows, *between, of_columns)], mask


def load(
    ref: jax.Ref, rows: Part, columns: Part, *before: Array | np.int32, between: Index = ()
) -> Array:
    """A tile of a matrix, with 0 for what does not count."""
    tile, mask = _tile(ref, rows, columns, before, between)
    return triton.load(tile, mask=mask, other=None if mask is None else 0)


def store(
    ref: jax.Ref,
    tile: Array,
    rows: Part,
    columns: Part,
    *before: Array | np.int32,
    between: Index = (),
) -> None:
    """Write what counts of a tile of a matrix."""
    place, mask = _tile(ref, rows, columns, before, between)
    triton.store(place, tile.astype(ref.dtype), mask=mask)


def _line(ref: jax.Ref, part: Part, before: Index) -> tuple[Any, Array | None]:
    """A stretch of a vector of known length, as `_tile`."""
    mask = None
    if part.end % part.size:
        mask = part.start + jnp.arange(part.size, dtype=jnp.int32) < part.end
    return ref.at[(*before, pl.ds(part.start, part.size))], mask


def load_line(ref: jax.Ref, part: Part, *before: Array | np.int32) -> Array:
    """A stretch of a vector of known length, with 0 for what does not count."""
    line, mask = _line(ref, part, before)
    return triton.load(line, mask=mask, other=None if mask is None else 0)


def store_line(ref: jax.Ref, values: Array, part: Part, *before: Array | np.int32) -> None:
    """Write what counts of a stretch of a vector of known length."""
    line, mask = _line(ref, part, before)
    triton.store(line, values.astype(ref.dtype), mask=mask)
