"""Hardware that is not at hand, to compile for."""

import importlib.util
import os

import jax
from jax.experimental import topologies

from esft_jax.errors import InputError

# A v4 chip has two cores, which work as one device only when asked to.
_CONFIG = {"v4": {"chip_config_name": "megacore"}}


def tpu_devices(name: str) -> list[jax.Device]:
    """Devices of a TPU slice, such as `v5e:2x4`, for meshes to compile for but not to run on.

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
    options = _CONFIG.get(name.partition(":")[0], {})
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
