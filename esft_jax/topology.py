"""Hardware that is not at hand, to compile for."""

import importlib.util
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from esft_jax.errors import InputError
from esft_jax.processes import split_cpu

# A v4 chip has two cores, which work as one device only when asked to.
_CONFIG = {"v4": {"chip_config_name": "megacore"}}


# What the compiler asks about a GPU.
_H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  device_memory_size: 85899345920
  memory_bandwidth: 3352000000000
  l2_cache_size: 52428800
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
platform_name: "CUDA"
runtime_version { major: 12 minor: 9 }
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


# The compiler ends the process when it is asked for a slice with too many or too few dimensions.
_TOPOLOGY = re.compile(
    r"(cpu|h100):N|(Nx)?(v5e|v6e):NxN|(Nx)?(v4|v5p|tpu7x):NxNxN".replace("N", r"[1-9]\d{,5}")
)
_MOST = 1024  # parts of a CPU, or GPUs of a host


def ahead_of_time_devices(name: str) -> list[jax.Device]:
    """Devices of a TPU slice (`v5e:2x4`), of several (`2xv5e:2x4`), of a host with H100 GPUs
    (`h100:8`), or of a CPU that is split (`cpu:8`).

    Raises:
        InputError: no such topology, or its compiler is not installed.
    """
    if not _TOPOLOGY.fullmatch(name):
        raise InputError(
            f"topology: {name!r}; expected a TPU slice such as v5e:2x4 (or v6e) or v5p:2x2x1 (or "
            "v4, tpu7x), several such as 2xv5e:2x4, h100:COUNT or cpu:COUNT"
        )
    kind, _, count = name.partition(":")
    if kind in ("cpu", "h100") and int(count) > _MOST:
        raise InputError(f"topology: {name!r}; expected at most {kind}:{_MOST}")
    match kind:
        case "cpu":
            return cpu_devices(int(count))
        case "h100":
            return h100_devices(int(count))
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


def h100_devices(count: int) -> list[jax.Device]:
    """H100 GPUs of one host, for meshes to compile for but not to run on.

    Raises:
        InputError: JAX's CUDA compiler is not installed.
    """
    if not any(importlib.util.find_spec(f"jax_cuda{cuda}_plugin") for cuda in (12, 13)):
        raise InputError("compiling for GPUs needs JAX's CUDA plugin: pip install 'esft-jax[cuda]'")
    # Only the compiler is used: there may be no driver and no CUDA libraries.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    return topologies.get_topology_desc(
        platform="cuda", target_config=_H100, topology=f"1x1x{count}"
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
