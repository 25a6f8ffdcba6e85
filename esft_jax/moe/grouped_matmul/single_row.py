"""Grouped products with matrices of a single row, such as biases: element-wise work.

A kernel would multiply blocks of zeros, and its result would be one more pass; a look-up can be
part of whatever comes next.

Letters: N rows, F width of a matrix.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from esft_jax.moe.grouped_matmul.bank import Bank
from esft_jax.moe.grouped_matmul.groups import Groups


def multiply(
    x: Float[Array, "N _"], banks: tuple[Bank, ...], groups: Groups, *, transposed: bool
) -> Float[Array, "N _"]:
    """As `xla.multiply`, of matrices `[1, F]`."""
    row = _row_of_each(len(x), banks, groups).astype(x.dtype)
    if not transposed:
        return x * row
    return jnp.sum(x * row, axis=1, keepdims=True, dtype=jnp.float32).astype(x.dtype)


def _row_of_each(count: int, banks: tuple[Bank, ...], groups: Groups) -> Float[Array, "N F"]:
    """The matrix that each of N = `count` rows meets; zeros for padding."""
    arrays: list[Any] = [bank.matrices for bank in banks]  # vectors are not quantised
    cuts = [
        jax.lax.dynamic_slice_in_dim(array, bank.first, bank.count)[:, 0]
        for array, bank in zip(arrays, banks, strict=True)
    ]
    table = jnp.concatenate([*cuts, jnp.zeros_like(cuts[0][:1])])
    _, ends, of_stretch = groups.stretches(count)
    stretch = jnp.cumsum(jnp.zeros(count, jnp.int32).at[ends[:-1]].add(1, mode="drop"))
    return table[stretch if of_stretch is None else of_stretch[stretch]]
