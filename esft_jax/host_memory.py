"""Arrays in the memory of the host, which devices read a part of at a time.

JAX knows of an array, traced ones too, in which of the two memories it is, and refuses operations
on arrays of both: what is computed with is moved to the device first. A slice that is moved at once
is read where it lies, so that the device never holds more of the array.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

# Where frozen experts are kept.
Memory = Literal["device", "host"]

# JAX's name of the memory that accelerators read by themselves.
PINNED = "pinned_host"


def is_on_host(array: Any) -> bool:
    """Whether an array is in the memory of the host. On a CPU, too, JAX tells the two apart."""
    return jax.typeof(array).memory_space == jax.memory.Space.Host


def host_sharding(device: jax.Device) -> NamedSharding:
    """A whole array in the memory of a device's host. JAX forgets the memory of arrays that are put
    together with a `SingleDeviceSharding`.
    """
    mesh = Mesh(np.array([device]), ("device",))
    return NamedSharding(mesh, PartitionSpec(), memory_kind=PINNED)


def shard_data(shard: jax.Shard) -> Array:
    """What a device holds of an array. In JAX's own `shard.data`, the memory is forgotten."""
    if shard.data.sharding.memory_kind != PINNED:
        return shard.data
    place = host_sharding(shard.device)
    return jax.make_array_from_single_device_arrays(shard.data.shape, place, [shard.data])


def to_device(array: Array) -> Array:
    """The array in the memory of the device; in a program."""
    return jax.device_put(array, jax.memory.Space.Device) if is_on_host(array) else array


def to_memory_of(array: Array, other: Array) -> Array:
    """The array in the memory that another one is in; in a program."""
    space = jax.memory.Space.Host if is_on_host(other) else jax.memory.Space.Device
    return jax.device_put(array, space)


def map_layers(apply: Callable[[Array], Array], stack: Array) -> Array:
    """`apply` to each layer of a stack, one after the other, on the device; in a program."""

    def of(layer: Array) -> Array:
        return apply(to_device(jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False)))

    return jax.lax.map(of, np.arange(len(stack)))
