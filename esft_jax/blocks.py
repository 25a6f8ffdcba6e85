"""Blocks of sharded arrays: reading them to the host and overwriting them, shard by shard.

An indexing operation on the whole array would let the compiler gather all of it on every device.
"""

from collections.abc import Iterable, Sequence
from functools import partial

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from esft_jax.host_memory import shard_data, to_device, to_memory_of

_STRIP = 16

Box = tuple[slice, ...]
"""Bounded slices without steps, one for each axis."""


def bounded(index: Sequence[slice], shape: Sequence[int]) -> Box:
    """The box that an index selects in an array of this shape."""
    return tuple(slice(*s.indices(size)[:2]) for s, size in zip(index, shape, strict=True))


def box_shape(box: Box) -> tuple[int, ...]:
    """Shape of the array a box selects."""
    return tuple(s.stop - s.start for s in box)


def intersect(one: Box, other: Box) -> Box | None:
    """What two boxes have in common, or None."""
    common = tuple(
        slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(one, other, strict=True)
    )
    return None if any(s.start >= s.stop for s in common) else common


def within(box: Box, outer: Box) -> Box:
    """A box as seen from the first corner of another one that contains it."""
    return tuple(
        slice(s.start - o.start, s.stop - o.start) for s, o in zip(box, outer, strict=True)
    )


def assign_transposed(target: np.ndarray, matrix: np.ndarray) -> None:
    """Copy the transpose of a matrix, which may change its type."""
    if target.dtype == matrix.dtype:
        # NumPy copies plain numbers, unlike bfloat16, without keeping other threads waiting.
        bits = np.dtype(f"u{matrix.itemsize}")
        target, matrix = target.view(bits), matrix.view(bits)
    # Rows of large matrices are often a power of two apart: of more than a few, the elements of a
    # column would evict each other from the processor's cache.
    for begin in range(0, len(matrix), _STRIP):
        strip = slice(begin, begin + _STRIP)
        target[:, strip] = matrix[strip].T


def read_block(array: jax.Array, box: Box) -> np.ndarray:
    """A block of an array, on the host of every process.

    All processes must ask for the same block at the same time.
    """
    block = np.zeros(box_shape(box), array.dtype)
    for shard in array.addressable_shards:
        own = bounded(shard.index, array.shape)
        common = intersect(box, own)
        if shard.replica_id or common is None:
            continue
        piece = _cut(shard_data(shard), _begin(common, own), box_shape(common))
        block[within(common, box)] = np.asarray(piece)
    if jax.process_count() > 1:
        # Every element comes from exactly one process; adding bits keeps it as it is.
        bits = np.dtype(f"u{block.itemsize}")
        block = process_allgather(block.view(bits)).sum(axis=0, dtype=bits).view(block.dtype)
    return block


def write_blocks(array: jax.Array, blocks: Iterable[tuple[Box, np.ndarray]]) -> jax.Array:
    """The array with some blocks overwritten; its own buffers are used up, not copied.

    Every process must give the same blocks.
    """
    shards = [(bounded(s.index, array.shape), shard_data(s)) for s in array.addressable_shards]
    for box, block in blocks:
        for number, (own, data) in enumerate(shards):
            common = intersect(box, own)
            if common is not None:
                piece = block[within(common, box)].astype(array.dtype)
                shards[number] = own, _overwrite(data, piece, _begin(common, own))
    return jax.make_array_from_single_device_arrays(
        array.shape, array.sharding, [data for _, data in shards]
    )


def _begin(box: Box, outer: Box) -> tuple[int, ...]:
    return tuple(s.start for s in within(box, outer))


@partial(jax.jit, static_argnums=2)
def _cut(data: jax.Array, begin: tuple[int, ...], shape: tuple[int, ...]) -> jax.Array:
    return to_device(jax.lax.dynamic_slice(data, begin, shape))


@partial(jax.jit, donate_argnums=0)
def _overwrite(data: jax.Array, piece: jax.Array, begin: tuple[int, ...]) -> jax.Array:
    return jax.lax.dynamic_update_slice(data, to_memory_of(piece, data), begin)
