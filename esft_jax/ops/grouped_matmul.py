"""Matrix products of row groups, each with its own matrix: the work of routed experts.

Letters: N rows, G groups, D input width, F output width.

`jax.lax.ragged_dot` multiplies every row with every matrix on CPU and on most TPU generations,
so it is not used. Here each group is cut into row blocks and a loop with a run-time trip count
multiplies exactly the blocks that hold rows.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax.struct import dataclass, field
from jax.custom_derivatives import CustomVJPPrimal
from jaxtyping import Array, Float, Int

# Rows per block: large enough to keep a core's matrix unit busy, small enough that the
# half-empty last block of every group stays cheap.
BLOCK = 64


def grouped_matmul(
    x: Float[Array, "N D"],
    banks: Sequence[Float[Array, "_ D F"]],
    group_sizes: Int[Array, " G"],
) -> Float[Array, "N F"]:
    """Multiply each group of consecutive rows with its own matrix.

    Args:
        x: rows sorted by group. Rows past `sum(group_sizes)` belong to nobody: their result is 0.
        banks: matrices of the groups in order, split over one or more arrays that are neither
            concatenated nor copied. Matrices are cast to the type of `x` block by block.
        group_sizes: rows per group, int32; G is the total number of matrices.

    Returns:
        The products, in the type of `x`.

    The weight gradient is computed only for the banks that are differentiated, in the bank's own
    type: with tuned and frozen experts in two banks, frozen ones cost nothing.
    """
    return _grouped_matmul(x, tuple(banks), group_sizes)


@dataclass
class _Schedule:
    """Where each block of each group starts; blocks of one bank are consecutive."""

    group: Int[Array, " M"]
    start: Int[Array, " M"]
    group_end: Int[Array, " M"]
    bank_bounds: tuple[Int[Array, ""], ...]  # first block of each bank, and the end


def _schedule(group_sizes: Array, bank_sizes: Sequence[int], rows: int, block: int) -> _Schedule:
    ends = jnp.cumsum(group_sizes)
    blocks = (group_sizes + block - 1) // block
    last_blocks = jnp.cumsum(blocks)
    index = jnp.arange(rows // block + len(group_sizes), dtype=jnp.int32)
    group = jnp.searchsorted(last_blocks, index, side="right").astype(jnp.int32)
    group = jnp.minimum(group, len(group_sizes) - 1)
    within = index - (last_blocks - blocks)[group]
    offsets = np.cumsum([0, *bank_sizes])
    padded = jnp.concatenate([jnp.zeros(1, last_blocks.dtype), last_blocks])
    return _Schedule(
        group=group,
        start=(ends - group_sizes)[group] + within * block,
        group_end=ends[group],
        bank_bounds=tuple(padded[offset] for offset in offsets),
    )


def _block_rows(schedule: _Schedule, i: Array, rows: int, block: int) -> tuple[Array, Array]:
    """First row of a window that holds block i inside the buffer, and which of its rows count."""
    start = jnp.minimum(schedule.start[i], rows - block)
    index = start + jnp.arange(block)
    valid = (index >= schedule.start[i]) & (index < schedule.group_end[i])
    return start, valid[:, None]


def _multiply(x: Array, banks: tuple[Array, ...], group_sizes: Array, transposed: bool) -> Array:
    """Rows times their matrices, or times the transposes."""
    rows, block = x.shape[0], min(BLOCK, x.shape[0])
    schedule = _schedule(group_sizes, [len(bank) for bank in banks], rows, block)
    width = banks[0].shape[1 if transposed else 2]
    out = jnp.zeros((rows, width), x.dtype)
    first_group = 0
    for bank, begin, end in zip(
        banks, schedule.bank_bounds[:-1], schedule.bank_bounds[1:], strict=True
    ):
        if len(bank) == 0:
            continue

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

        out = jax.lax.fori_loop(begin, end, step, out)
        first_group += len(bank)
    return out


@jax.named_scope("expert_weight_gradient")
def _weight_gradient(
    x: Array, grad: Array, banks: tuple[Array, ...], group_sizes: Array, which: int
) -> Array:
    """Gradient of one bank: for every group, its rows' inputs times their output gradients."""
    rows, block = x.shape[0], min(BLOCK, x.shape[0])
    schedule = _schedule(group_sizes, [len(bank) for bank in banks], rows, block)
    first_group = sum(len(bank) for bank in banks[:which])
    total = jnp.zeros(banks[which].shape, jnp.float32)

    def step(i: Array, total: Array) -> Array:
        start, valid = _block_rows(schedule, i, rows, block)
        group = schedule.group[i] - first_group
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

    begin, end = schedule.bank_bounds[which], schedule.bank_bounds[which + 1]
    return jax.lax.fori_loop(begin, end, step, total).astype(banks[which].dtype)


@jax.custom_vjp
def _grouped_matmul(x: Array, banks: tuple[Array, ...], group_sizes: Array) -> Array:
    return _multiply(x, banks, group_sizes, transposed=False)


def _forward(
    x: CustomVJPPrimal, banks: tuple[CustomVJPPrimal, ...], group_sizes: CustomVJPPrimal
) -> tuple[Array, tuple]:
    values = tuple(bank.value for bank in banks)
    out = _multiply(x.value, values, group_sizes.value, transposed=False)
    # Whether an operand is differentiated is known while tracing, so what nobody asked for is
    # neither computed nor, for `x`, kept.
    learned = tuple(bank.perturbed and len(bank.value) > 0 for bank in banks)
    kept = x.value if any(learned) else None
    return out, (kept, values, group_sizes.value, _Needed(x.perturbed, learned))


@dataclass
class _Needed:
    """Trace-time facts for the backward rule: which gradients to compute."""

    x: bool = field(pytree_node=False)
    banks: tuple[bool, ...] = field(pytree_node=False)


def _backward(residuals: tuple, grad: Array) -> tuple:
    x, banks, group_sizes, needed = residuals
    dx = _multiply(grad, banks, group_sizes, transposed=True) if needed.x else None
    dbanks = tuple(
        _weight_gradient(x, grad, banks, group_sizes, i) if learned else None
        for i, learned in enumerate(needed.banks)
    )
    return dx, dbanks, None


_grouped_matmul.defvjp(_forward, _backward, symbolic_zeros=True)
