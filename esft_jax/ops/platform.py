"""Which platform a program is traced for, and what was made for it."""

from importlib.util import find_spec
from typing import Literal

import jax

from esft_jax.accelerators import GPUS, gpu_of

# The `cpu` extra.
_CPU_EXTRA = ("numba", "threadpoolctl")


def target_platform() -> str:
    """Platform compiled for: `cpu`, `gpu` or `tpu`. Inside `shard_map` it is the mesh's, which may
    be one that this machine does not have (ahead-of-time compilation); else JAX's default.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()


def block_shared_memory() -> int:
    """Bytes of shared memory that a program may take on the GPU compiled for, which is found as in
    `target_platform`; of a GPU that is not known by its name, by the compute capability of the one
    that is here, or else what all have.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    gpu = gpu_of((device or jax.devices()[0]).device_kind)
    if gpu is not None:
        return gpu.architecture.block_shared_memory
    known = {gpu.architecture.capability: gpu.architecture for gpu in GPUS.values()}
    least = min(known.values(), key=lambda architecture: architecture.block_shared_memory)
    capability = getattr(jax.devices()[0], "compute_capability", "")
    return known.get(capability, least).block_shared_memory


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
