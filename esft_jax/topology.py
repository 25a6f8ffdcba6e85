"""Hardware that is not at hand, to compile for."""

import importlib.util
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from esft_jax.accelerators import GPUS
from esft_jax.errors import InputError
from esft_jax.processes import split_cpu

# A v4 chip has two cores, which work as one device only when asked to.
_CONFIG = {"v4": {"chip_config_name": "megacore"}}


# What the compiler asks about a GPU. It links no libraries of CUDA, so any version of these does.
_GPU = """
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  core_count: {gpu.cores}
  fpus_per_core: {gpu.architecture.lanes}
  clock_rate_ghz: {gpu.clock}
  device_memory_size: {gpu.memory}
  memory_bandwidth: {gpu.peaks.memory:.0f}
  l2_cache_size: {gpu.l2}
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {gpu.architecture.block_shared_memory}
  shared_memory_per_core: {gpu.architecture.shared_memory}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: {gpu.architecture.threads}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}}
platform_name: "CUDA"
runtime_version {{ major: 12 minor: 9 }}
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{gpu.kinds[0]}"
"""


# The compiler ends the process when it is asked for a slice with too many or too few dimensions.
_TOPOLOGY = re.compile(
    rf"({'|'.join(['cpu', *GPUS])}):N|(Nx)?(v5e|v6e):NxN|(Nx)?(v4|v5p|tpu7x):NxNxN".replace(
        "N", r"[1-9]\d{,5}"
    )
)
_MOST = 1024  # parts of a CPU, or GPUs of a host
TOPOLOGIES = (
    "a TPU slice such as v5e:2x4 (or v6e) or v5p:2x2x1 (or v4, tpu7x), several such as 2xv5e:2x4, "
    f"GPUs of a host such as h100:8 (or {', '.join(name for name in GPUS if name != 'h100')}), or "
    "cpu:COUNT"
)


def ahead_of_time_devices(name: str) -> list[jax.Device]:
    """Devices of a TPU slice (`v5e:2x4`), of several (`2xv5e:2x4`), of a host with GPUs
    (`h100:8`), or of a CPU that is split (`cpu:8`).

    Raises:
        InputError: no such topology, or its compiler is not installed.
    """
    if not _TOPOLOGY.fullmatch(name):
        raise InputError(f"topology: {name!r}; expected {TOPOLOGIES}")
    kind, _, count = name.partition(":")
    if (kind == "cpu" or kind in GPUS) and int(count) > _MOST:
        raise InputError(f"topology: {name!r}; expected at most {kind}:{_MOST}")
    if kind == "cpu":
        return cpu_devices(int(count))
    if kind in GPUS:
        return gpu_devices(kind, int(count))
    try:
        return tpu_devices(name)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"topology: {name!r} is no slice of TPUs: {reason}") from None


def cpu_devices(count: int) -> list[jax.Device]:
    """Parts of this machine's CPU.

    Raises:
        InputError: JAX has split it into fewer already.
    """
    split_cpu(count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise InputError(f"topology: cpu:{count}; JAX has split this CPU into {len(devices)}")
    return devices[:count]


def lowering_platform(devices: list[jax.Device]) -> str:
    """The platform to lower for, `Traced.lower(lowering_platforms=...)`, as JAX names it there."""
    platform = devices[0].platform
    return "cuda" if platform == "gpu" else platform


def gpu_devices(name: str, count: int) -> list[jax.Device]:
    """GPUs of one host, for meshes to compile for but not to run on.

    Args:
        name: one of `accelerators.GPUS`.

    Raises:
        InputError: JAX's CUDA compiler is not installed.
    """
    if not any(importlib.util.find_spec(f"jax_cuda{cuda}_plugin") for cuda in (12, 13)):
        raise InputError("compiling for GPUs needs JAX's CUDA plugin: pip install 'esft-jax[cuda]'")
    # Only the compiler is used: there may be no driver and no CUDA libraries.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    gpu = GPUS[name]
    major, minor = gpu.architecture.capability.split(".")
    target = _GPU.format(gpu=gpu, major=major, minor=minor)
    return topologies.get_topology_desc(
        platform="cuda", target_config=target, topology=f"1x1x{count}"
    ).devices


def tpu_devices(name: str) -> list[jax.Device]:
    """Devices of TPU slices, such as `v5e:2x4`, for meshes to compile for but not to run on.

    Raises:
        InputError: the TPU compiler is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("compiling for TPU needs its compiler: pip install libtpu")
    # The compiler looks for a machine to run on: it shall not ask the network, nor fail because
    # another process has loaded it.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    count, _, one_slice = name.partition("x") if name[0].isdigit() else ("", "", name)
    options: dict[str, Any] = dict(_CONFIG.get(hardware(name), {}))
    if count:
        options["num_slices"] = int(count)
    return topologies.get_topology_desc(platform="tpu", topology_name=one_slice, **options).devices


def hardware(name: str) -> str:
    """Of a topology: `v5e` of `v5e:2x4` and of `2xv5e:2x4`."""
    return re.sub(r"^\d+x", "", name).partition(":")[0]
