"""Gradients of banks that a scan over layers reads, added up in place.

Letters: N devices along `data`, R rows of a bank, W rows of a layer's window.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from esft_jax.sharding import DATA, REPLICA, RULES

# A tree like the banks', of arrays `[N, R, ...]`: a copy for each of N devices along `data`.
Carried = Any


def count_copies(mesh: Mesh | None) -> int:
    """Devices along `data`, over all replicas: expert groups."""
    return 1 if mesh is None else mesh.shape[REPLICA] * mesh.shape[DATA]


def carry_banks(banks: Any, mesh: Mesh | None) -> Carried:
    """What a scan over layers carries along so that their gradients add up in place.

    It has the values of the banks, which are read only where they are small. Going backwards it is
    the gradient, to which each layer adds its own rows. If every layer cut its rows out of the bank
    itself, each would make a gradient as large as the bank, and sum it over all expert groups.
    With N of these, each of them has a gradient of its own, and they are summed once.

    Args:
        banks: a tree of arrays `[R, ...]`.
    """
    copies = count_copies(mesh)

    def carry(bank: Array) -> Array:
        carried = jnp.broadcast_to(bank, (copies, *bank.shape))
        if mesh is None:
            return carried
        place = NamedSharding(mesh, PartitionSpec((REPLICA, DATA), RULES.experts))
        return jax.lax.with_sharding_constraint(carried, place)

    return jax.tree.map(carry, banks)


@jax.custom_vjp
def begin_gradient(x: Float[Array, "*_"], carried: Carried, earlier: Carried) -> Float[Array, "*_"]:
    """`x`, unchanged. Going backwards, what is carried begins with an earlier gradient, not with
    zeros: gradients of several batches add up in place, too.

    Args:
        earlier: a tree of arrays as `carried` has them.
    """
    return x


def _begin_forward(x: Array, carried: Carried, earlier: Carried) -> tuple[Array, Carried]:
    return x, earlier


def _begin_backward(earlier: Carried, grad: Array) -> tuple[Array, Carried, None]:
    return grad, earlier, None


begin_gradient.defvjp(_begin_forward, _begin_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def take_rows_of(
    carried: Float[Array, "1 R *_"], start: Int[Array, ""], size: int
) -> tuple[Float[Array, "1 R *_"], Float[Array, "W *_"]]:
    """What is carried, unchanged, and W = `size` of its rows; see `carry_banks`."""
    return carried, jax.lax.dynamic_slice_in_dim(carried[0], start, size)


def _take_forward(carried: Array, start: Array, size: int) -> tuple[tuple[Array, Array], Array]:
    return take_rows_of(carried, start, size), start


def _take_backward(size: int, start: Array, grads: tuple[Array, Array]) -> tuple[Array, None]:
    total, own = grads
    before = jax.lax.dynamic_slice_in_dim(total, start, size, axis=1)
    return jax.lax.dynamic_update_slice_in_dim(total, before + own, start, axis=1), None


take_rows_of.defvjp(_take_forward, _take_backward)
