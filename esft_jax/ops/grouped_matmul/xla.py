"""Grouped products in plain XLA, for CPU and for whatever has no kernel of its own.

`jax.lax.ragged_dot` multiplies every row with every matrix on CPU and on most TPU generations, so
it is not used. Here each group is cut into row blocks and a loop with a run-time trip count
multiplies exactly the blocks that hold rows.
"""

import jax
import jax.numpy as jnp
from flax.struct import dataclass
from jaxtyping import Array, Float, Int

# Rows per block: large enough to keep a core's matrix unit busy, small enough that the
# half-empty last block of every group stays cheap.
BLOCK = 64


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
    schedule = _schedule(group_sizes, rows, block)
    out = jnp.zeros((rows, banks[0].shape[1 if transposed else 2]), x.dtype)
    first_group = 0
    for bank in banks:

        def step(i: Array, out: Array, bank: Array = bank, first: int = first_group) -> Array:
            start, valid = _block_rows(schedule, i, rows, block)
            matrix = jax.lax.dynamic_index_in_dim(
                bank, schedule.group[i] - first, keepdims=False
            ).astype(x.dtype)
            product = jax.lax.dot_general(
                jax.lax.dynamic_slice_in_dim(x, start, block),
                matrix,
                (((1,), (1 if transposed else 0,)), ((), ())),
            )
            before = jax.lax.dynamic_slice_in_dim(out, start, block)
            return jax.lax.dynamic_update_slice_in_dim(
                out, jnp.where(valid, product, before), start, 0
            )

        begin, end = (schedule.bounds[g] for g in (first_group, first_group + len(bank)))
        out = jax.lax.fori_loop(begin, end, step, out)
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
    rows, block = x.shape[0], min(BLOCK, x.shape[0])
    schedule = _schedule(group_sizes, rows, block)

    def step(i: Array, total: Array) -> Array:
        start, valid = _block_rows(schedule, i, rows, block)
        group = schedule.group[i] - first
        # Both sides are masked: a foreign row's infinity times 0 would be NaN.
        rows_x, rows_grad = (
            jnp.where(valid, jax.lax.dynamic_slice_in_dim(a, start, block), 0) for a in (x, grad)
        )
        update = jax.lax.dot_general(
            rows_x,
            rows_grad,
            (((0,), (0,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        so_far = jax.lax.dynamic_index_in_dim(total, group, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(total, so_far + update, group, 0)

    total = jnp.zeros((count, x.shape[1], grad.shape[1]), jnp.float32)
    return jax.lax.fori_loop(schedule.bounds[first], schedule.bounds[first + count], step, total)


@dataclass
class _Schedule:
    """Where each block of each group starts."""

    group: Int[Array, " M"]
    start: Int[Array, " M"]
    group_end: Int[Array, " M"]
    bounds: Int[Array, " G+1"]  # first block of each group, and the number of blocks


def _schedule(group_sizes: Array, rows: int, block: int) -> _Schedule:
    ends = jnp.cumsum(group_sizes)
    blocks = (group_sizes + block - 1) // block
    bounds = jnp.concatenate([jnp.zeros(1, blocks.dtype), jnp.cumsum(blocks)])
    index = jnp.arange(rows // block + len(group_sizes), dtype=jnp.int32)
    group = jnp.searchsorted(bounds[1:], index, side="right").astype(jnp.int32)
    group = jnp.minimum(group, len(group_sizes) - 1)
    return _Schedule(
        group=group,
        start=(ends - group_sizes)[group] + (index - bounds[group]) * block,
        group_end=ends[group],
        bounds=bounds,
    )


def _block_rows(schedule: _Schedule, i: Array, rows: int, block: int) -> tuple[Array, Array]:
    """First row of a window that holds block i inside the buffer, and which of its rows count."""
    start = jnp.minimum(schedule.start[i], rows - block)
    index = start + jnp.arange(block)
    valid = (index >= schedule.start[i]) & (index < schedule.group_end[i])
    return start, valid[:, None]
