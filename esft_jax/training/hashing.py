"""A hash of 32-bit words, and the positions of elements, however their array is split."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

ODD = np.uint32(0x9E3779B1)  # spreads neighbouring positions


def positions(
    shape: tuple[int, ...], first: UInt32[Array, " N"] | None = None
) -> UInt32[Array, "*S"]:
    """The position of every element in an array of this shape, in row-major order, modulo 2^32.

    Args:
        first: positions along the first axis, if they are others than 0 to N - 1.
    """
    position, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        if axis == 0 and first is not None:
            steps = first.reshape(-1, *[1] * (len(shape) - 1))
        else:
            steps = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        position += steps * jnp.uint32(stride % 2**32)
        stride *= shape[axis]
    return position


def mixed(words: UInt32[Array, "*S"]) -> UInt32[Array, "*S"]:
    """The finaliser of MurmurHash3 (public domain), a permutation of 32-bit numbers."""
    words = (words ^ (words >> 16)) * jnp.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * jnp.uint32(0xC2B2AE35)
    return words ^ (words >> 16)
