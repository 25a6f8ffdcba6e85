"""Grouped products in plain XLA, for CPU and for whatever has no kernel of its own.

`jax.lax.ragged_dot` multiplies every row with every matrix on CPU and on most TPU generations, so
it is not used. Here loops with run-time trip counts go through the groups that have rows, and
through the row blocks of each; a group's matrix is cut out of its bank once.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Rows per block of a product: large enough to keep a core's matrix unit busy, small enough that the
# half-empty last block of every group stays cheap.
BLOCK = 64
# Rows that one product of a weight gradient may sum over: each group takes the smallest that holds
# it. Fewer products mean fewer passes over a result as large as the matrix.
SUMMED = (64, 128, 192, 256, 384, 512)


def multiply(
    x: Float[Array, "N C"],
    banks: tuple[Float[Array, "_ D F"], ...],
    group_sizes: Int[Array, " G"],
    *,
    transposed: bool,
) -> Float[Array, "N O"]:
    """Rows times their matrices (C = D, O = F), or times the transposes (C = F, O = D).

    Rows past `sum(group_sizes)` become 0. Sums are made in float32.
    """
    rows, block = x.shape[0], min(BLOCK, x.shape[0])
    ends = jnp.cumsum(group_sizes)
    starts = ends - group_sizes
    num_groups = len(group_sizes)
    occupied = jnp.flatnonzero(group_sizes, size=num_groups, fill_value=0).astype(jnp.int32)
    bounds = jnp.pad(jnp.cumsum(group_sizes > 0), (1, 0))
    out = jnp.zeros((rows, banks[0].shape[1 if transposed else 2]), x.dtype)
    first_group = 0
    for bank in banks:

        def group(i: Array, out: Array, bank: Array = bank, first: int = first_group) -> Array:
            g = occupied[i]
            matrix = jax.lax.dynamic_index_in_dim(bank, g - first, keepdims=False).astype(x.dtype)

            def step(j: Array, out: Array) -> Array:
                start, valid = _window(starts[g] + j * block, ends[g], block, rows)
                product = jax.lax.dot_general(
                    jax.lax.dynamic_slice_in_dim(x, start, block),
                    matrix,
                    (((1,), (1 if transposed else 0,)), ((), ())),
                )
                before = jax.lax.dynamic_slice_in_dim(out, start, block)
                return jax.lax.dynamic_update_slice_in_dim(
                    out, jnp.where(valid, product, before), start, 0
                )

            return jax.lax.fori_loop(0, -(-group_sizes[g] // block), step, out)

        begin, end = (bounds[g] for g in (first_group, first_group + len(bank)))
        out = jax.lax.fori_loop(begin, end, group, out)
        first_group += len(bank)
    return out


def weight_gradient(
    x: Float[Array, "N D"],
    grad: Float[Array, "N F"],
    group_sizes: Int[Array, " G"],
    first: int,
    count: int,
) -> Float[Array, "count D F"]:
    """For groups `first` to `first + count`: their rows' inputs times their output gradients.

    Returned in float32.
    """
    rows = x.shape[0]
    summed = [*(size for size in SUMMED if size < rows), rows][: len(SUMMED)]
    longest = summed[-1]
    ends = jnp.cumsum(group_sizes)
    starts = ends - group_sizes

    def product(size: int, begin: Array, end: Array) -> Array:
        start, valid = _window(begin, end, size, rows)
        # Both sides are masked: a foreign row's infinity times 0 would be NaN.
        rows_x, rows_grad = (
            jnp.where(valid, jax.lax.dynamic_slice_in_dim(a, start, size), 0) for a in (x, grad)
        )
        return jax.lax.dot_general(
            rows_x, rows_grad, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )

    def group(g: Array, total: Array) -> Array:
        def part(j: Array | int) -> Array:
            begin = starts[g] + j * longest
            smallest = jnp.searchsorted(jnp.asarray(summed), jnp.minimum(ends[g] - begin, longest))
            return jax.lax.switch(
                smallest, [partial(product, size) for size in summed], begin, ends[g]
            )

        parts = -(-group_sizes[g] // longest)
        gradient = jax.lax.fori_loop(1, parts, lambda j, so_far: so_far + part(j), part(0))
        return jax.lax.dynamic_update_index_in_dim(total, gradient, g - first, 0)

    total = jnp.zeros((count, x.shape[1], grad.shape[1]), jnp.float32)
    return jax.lax.fori_loop(first, first + count, group, total)


def _window(begin: Array, end: Array, size: int, rows: int) -> tuple[Array, Array]:
    """First of `size` rows that lie inside the buffer and hold what they can of `[begin, end)`
    from its start, and which of them do, `[size, 1]`.
    """
    start = jnp.minimum(begin, rows - size)
    index = start + jnp.arange(size)
    return start, ((index >= begin) & (index < end))[:, None]
