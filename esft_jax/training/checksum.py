"""Checksums of sharded arrays: the same on every mesh and from any number of processes."""

import json
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32

from esft_jax.training.hashing import ODD, mixed, positions

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def checksums(tree: Any) -> dict[str, int]:
    """A 32-bit checksum of every array in a tree, by its path. All processes call it together.

    Elements' bits are mixed with their position and summed modulo 2^32: sums do not depend on how
    an array is split. The mixing is one-to-one, so that one damaged element is always noticed, and
    several are missed in one case of 2^32.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    sums = jax.device_get(_checksums([leaf for _, leaf in leaves]))
    return {jax.tree_util.keystr(path): int(s) for (path, _), s in zip(leaves, sums, strict=True)}


@jax.jit
def _checksums(leaves: list[Array]) -> list[UInt32[Array, ""]]:
    return [_checksum(leaf) for leaf in leaves]


def _checksum(array: Array) -> UInt32[Array, ""]:
    words = jax.lax.bitcast_convert_type(array, _WORDS[array.dtype.itemsize]).astype(jnp.uint32)
    return jnp.sum(mixed(words + positions(array.shape) * ODD), dtype=jnp.uint32)


def json_checksum(value: Any) -> int:
    """CRC-32 of a JSON value, whatever the order of keys and the blanks."""
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())
