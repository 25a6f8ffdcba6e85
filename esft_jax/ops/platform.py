"""Which platform a program is traced for, and what was made for it."""

from importlib.util import find_spec
from typing import Literal

import jax

# The `cpu` extra.
_CPU_EXTRA = ("numba", "threadpoolctl")


def target_platform() -> str:
    """Platform compiled for: `cpu`, `gpu` or `tpu`. Inside `shard_map` it is the mesh's, which may
    be one that this machine does not have (ahead-of-time compilation); else JAX's default.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()


def fastest_implementation() -> Literal["cpu", "gpu", "tpu", "xla"]:
    """Which implementation of an operation suits the platform compiled for: its own, or `xla`."""
    match target_platform():
        case "gpu":
            return "gpu"
        case "tpu":
            return "tpu"
        case "cpu" if all(map(find_spec, _CPU_EXTRA)):
            return "cpu"
    return "xla"
