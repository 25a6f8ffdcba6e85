"""Grouped products in plain XLA, for CPU and for whatever has no kernel of its own.

`jax.lax.ragged_dot` multiplies every row with every matrix on CPU and on most TPU generations, so
it is not used. Here loops with run-time trip counts go through the groups that have rows, and
through the row blocks of each; a group's matrix is cut out of its bank once.

Letters: N rows, G groups, C and O the sides of a matrix as it is multiplied, D and F as it lies.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from esft_jax.moe.grouped_matmul.bank import Bank
from esft_jax.moe.grouped_matmul.groups import Groups

# Rows that one product may cover: each group takes the smallest that holds it. Fewer products mean
# fewer passes over a matrix, or over a weight gradient as large as one.
COVERED = (64, 128, 192, 256, 320, 384)


def multiply(
    x: Float[Array, "N C"],
    banks: tuple[Bank, ...],
    groups: Groups,
    *,
    transposed: bool,
) -> Float[Array, "N O"]:
    """Rows times their matrices `[D, F]` (C = D, O = F), or times the transposes (C = F, O = D).

    Padding rows become 0. Sums are made in float32.
    """
    rows = x.shape[0]
    covered = _covered(rows)
    sizes, ends = groups.sizes, groups.ends
    starts = ends - sizes
    # What no single product covers is cut into pieces of the shortest, to waste little of the last.
    cover = jnp.asarray([*covered, covered[0]])[jnp.searchsorted(jnp.asarray(covered), sizes)]
    out = jnp.zeros((rows, banks[0].width(transposed=transposed)), x.dtype)
    # A loop for each size: a choice inside of one loop would copy `out` in every turn.
    for size in covered:
        chosen = (cover == size) & (sizes > 0)
        fitting = jnp.flatnonzero(chosen, size=len(chosen), fill_value=0).astype(jnp.int32)
        bounds = jnp.pad(jnp.cumsum(chosen), (1, 0))
        first = 0
        for bank in banks:

            def group(
                i: Array,
                out: Array,
                size: int = size,
                fitting: Array = fitting,
                bank: Bank = bank,
                first: int = first,
            ) -> Array:
                g = fitting[i]
                matrix = bank.matrices[bank.first + g - first].astype(x.dtype)

                def piece(j: Array | int, out: Array) -> Array:
                    start, valid = _window(starts[g] + j * size, ends[g], size, rows)
                    product = jax.lax.dot_general(
                        jax.lax.dynamic_slice_in_dim(x, start, size),
                        matrix,
                        (((1,), (1 if transposed else 0,)), ((), ())),
                    )
                    before = jax.lax.dynamic_slice_in_dim(out, start, size)
                    return jax.lax.dynamic_update_slice_in_dim(
                        out, jnp.where(valid, product, before), start, 0
                    )

                if size > covered[0]:
                    return piece(0, out)
                return jax.lax.fori_loop(0, -(-sizes[g] // size), piece, out)

            out = jax.lax.fori_loop(bounds[first], bounds[first + len(bank)], group, out)
            first += len(bank)
    return out


def weight_gradient(
    x: Float[Array, "N D"],
    grad: Float[Array, "N F"],
    groups: Groups,
    first: int,
    count: int,
) -> Float[Array, "count D F"]:
    """For groups `first` to `first + count`: their rows' inputs times their output gradients.

    Returned in float32.
    """
    rows = x.shape[0]
    summed = _covered(rows)
    longest = summed[-1]
    sizes, ends = groups.sizes, groups.ends
    starts = ends - sizes

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

        parts = -(-sizes[g] // longest)
        gradient = jax.lax.fori_loop(1, parts, lambda j, so_far: so_far + part(j), part(0))
        return jax.lax.dynamic_update_index_in_dim(total, gradient, g - first, 0)

    total = jnp.zeros((count, x.shape[1], grad.shape[1]), jnp.float32)
    return jax.lax.fori_loop(first, first + count, group, total)


def _covered(rows: int) -> tuple[int, ...]:
    return (*(size for size in COVERED if size < rows), rows)[: len(COVERED)]


def _window(begin: Array, end: Array, size: int, rows: int) -> tuple[Array, Array]:
    """First of `size` rows that lie inside the buffer and hold what they can of `[begin, end)`
    from its start, and which of them do, `[size, 1]`.
    """
    start = jnp.minimum(begin, rows - size)
    index = start + jnp.arange(size)
    return start, ((index >= begin) & (index < end))[:, None]
