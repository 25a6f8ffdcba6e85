"""Moving token rows to their experts' groups and back, with gathers in both directions.

Letters: T tokens, K experts per token, N = T * K assignments, M of them, G groups, D model width.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from esft_jax.errors import InputError


class Dispatch(NamedTuple):
    """A permutation of the N assignments that sorts them by group.

    Attributes:
        order: assignment at each sorted place, int32 `[N]`; assignment `t * K + k` is token t's
            k-th expert.
        place: sorted place of each assignment, int32 `[N]`; the inverse of `order`.
        group_sizes: assignments per group, int32 `[G]`.
    """

    order: Int[Array, " N"]
    place: Int[Array, " N"]
    group_sizes: Int[Array, " G"]


def sort_by_group(groups: Int[Array, "T K"], num_groups: int) -> Dispatch:
    """Sort assignments by group; those of group `num_groups` come last and are not counted.

    Raises:
        InputError: more assignments than 2^32 over the groups.
    """
    flat = groups.reshape(-1)
    if flat.size * (num_groups + 1) > 2**32:
        raise InputError(
            f"{flat.size} assignments of tokens to {num_groups} experts at once; expected at most "
            f"{2**32 // (num_groups + 1)}, by a smaller batch_size or more train.micro_batches"
        )
    # A number tells both group and assignment: sorting numbers alone is faster than sorting pairs,
    # on a CPU five times.
    index = jnp.arange(flat.size, dtype=jnp.uint32)
    order = jax.lax.sort(flat.astype(jnp.uint32) * flat.size + index) % flat.size
    order, index = order.astype(jnp.int32), index.astype(jnp.int32)
    place = jnp.zeros_like(order).at[order].set(index, unique_indices=True)
    group_sizes = jnp.zeros(num_groups, jnp.int32).at[flat].add(1, mode="drop")
    return Dispatch(order, place, group_sizes)


@jax.custom_vjp
def take_rows(x: Float[Array, "T *D"], dispatch: Dispatch) -> Float[Array, "N *D"]:
    """Each assignment's token row, or its own entry of `N`, in sorted order. Its gradient is a
    gather too, where JAX's own would be a scatter-add of wide rows.
    """
    return x[dispatch.order // (dispatch.order.size // x.shape[0])]


def _take_forward(x: Array, dispatch: Dispatch) -> tuple[Array, tuple[Dispatch, int]]:
    return take_rows(x, dispatch), (dispatch, x.shape[0])


def _take_backward(residuals: tuple[Dispatch, int], grad: Array) -> tuple[Array, None]:
    dispatch, tokens = residuals
    return _sum_by_token(grad, dispatch, tokens), None


take_rows.defvjp(_take_forward, _take_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def combine(y: Float[Array, "N D"], dispatch: Dispatch, tokens: int) -> Float[Array, "T D"]:
    """The sum of each of the T tokens' rows, made in float32."""
    return _sum_by_token(y, dispatch, tokens)


def _combine_forward(y: Array, dispatch: Dispatch, tokens: int) -> tuple[Array, Dispatch]:
    return combine(y, dispatch, tokens), dispatch


def _combine_backward(tokens: int, dispatch: Dispatch, grad: Array) -> tuple[Array, None]:
    return take_rows(grad, dispatch), None


combine.defvjp(_combine_forward, _combine_backward)


def _sum_by_token(rows: Array, dispatch: Dispatch, tokens: int) -> Array:
    # A gather for each of a token's experts: they fuse into one pass that makes nothing as long as
    # all assignments.
    total = jnp.zeros((tokens, *rows.shape[1:]), jnp.float32)
    for place in dispatch.place.reshape(tokens, -1).T:
        total += rows[place]
    return total.astype(rows.dtype)


def piece_of(
    dispatch: Dispatch, index: Int[Array, ""], size: int
) -> tuple[Int[Array, " size"], Int[Array, " G"]]:
    """The sorted assignments `index * size` and following, and how many of them each group has.

    Those past the counted ones are any.
    """
    first = index * size
    missing = -dispatch.order.size % size
    order = jax.lax.dynamic_slice_in_dim(jnp.pad(dispatch.order, (0, missing)), first, size)
    ends = jnp.cumsum(dispatch.group_sizes)
    begins = ends - dispatch.group_sizes
    return order, jnp.clip(ends - first, 0, size) - jnp.clip(begins - first, 0, size)


def add_to_tokens(
    total: Float[Array, "T D"], rows: Float[Array, "M D"], place: Int[Array, " N"]
) -> Float[Array, "T D"]:
    """Add rows to those of their tokens.

    One gather for each of a token's experts, so that nothing is as long as all assignments.

    Args:
        place: of each assignment among the rows; outside of them for one that has none there.
    """
    places = place.reshape(len(total), -1).T

    def add(k: Array, total: Array) -> Array:
        here = (places[k] >= 0) & (places[k] < len(rows))
        taken = rows[jnp.where(here, places[k], 0)]
        return total + jnp.where(here[:, None], taken, 0)

    return jax.lax.fori_loop(0, len(places), add, total)
