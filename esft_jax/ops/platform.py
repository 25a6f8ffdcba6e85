"""Which platform a program is traced for, and what was made for it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from typing import Literal

import jax

from esft_jax.accelerators import GPUS, gpu_of
from esft_jax.errors import InputError, shown

# The `cpu` extra.
_CPU_EXTRA = ("numba", "threadpoolctl")

# `xla` does without kernels that were made for a platform, should one of them fail there.
KERNELS = "ESFT_KERNELS"
_portable = ContextVar("portable", default=False)


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


@contextmanager
def portable() -> Iterator[None]:
    """What is traced within is plain XLA, whatever the platform has kernels for."""
    # What JAX has traced before would be taken again.
    jax.clear_caches()
    token = _portable.set(True)
    try:
        yield
    finally:
        _portable.reset(token)
        jax.clear_caches()


def fastest_implementation() -> Literal["cpu", "gpu", "tpu", "xla"]:
    """Which implementation of an operation suits the platform compiled for: its own, or `xla`;
    this one in any case, if the environment says `ESFT_KERNELS=xla`.

    Raises:
        InputError: it says something else.
    """
    wanted = os.environ.get(KERNELS, "")
    if wanted not in ("", "xla"):
        raise InputError(f"{KERNELS}: {shown(wanted)}; expected xla, or nothing")
    if wanted or _portable.get():
        return "xla"
    match target_platform():
        case "gpu":
            return "gpu"
        case "tpu":
            return "tpu"
        case "cpu" if all(map(find_spec, _CPU_EXTRA)):
            return "cpu"
    return "xla"
