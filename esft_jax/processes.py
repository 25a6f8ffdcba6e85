"""What each process does about devices before JAX starts, and how processes agree."""

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from esft_jax.errors import InputError

_DEV = Path("/dev")


def split_cpu(devices: int | None) -> None:
    """Have JAX split the CPU into this many devices, if any; no effect on accelerators.

    JAX fixes its devices when it first touches them, so this comes before everything else. Where
    they are fixed already (`XLA_FLAGS`, or JAX in use), `make_mesh` checks that they suffice.
    """
    if devices is None:
        return
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", devices)


def use_cpu_only() -> None:
    """Leave accelerators alone: on a TPU slice they would wait for all its hosts.

    No effect where JAX has touched its devices already.
    """
    jax.config.update("jax_platforms", "cpu")


def skip_absent_tpu() -> None:
    """Keep JAX from looking for a TPU where there is none, unless the environment asks for it.

    Where `libtpu` is installed, as for `plan`, looking for chips prints lines of errors. Without
    the files of a driver it can find none. Where there may be a GPU, JAX chooses.
    """
    drivers = ("accel[0-9]*", "vfio/[0-9]*", "nvidia[0-9]*", "nvidiactl", "dxg", "kfd")
    if jax.config.values["jax_platforms"] or "JAX_FORCE_TPU_INIT" in os.environ:
        return
    if importlib.util.find_spec("libtpu") and not any(any(_DEV.glob(name)) for name in drivers):
        jax.config.update("jax_platforms", "cpu")


def on_first_process(action: Callable[[], object], what: str) -> None:
    """Run an action on process 0 while all others wait for it; if it fails, all of them end.

    Raises:
        InputError: see `on_all_processes`.
    """
    with on_all_processes(what):
        if jax.process_index() == 0:
            action()


@contextlib.contextmanager
def on_all_processes(what: str) -> Iterator[None]:
    """A block at whose end processes wait for each other; if it fails on one, all of them end.

    Raises:
        InputError: raised in the block here, or on another process; or the system failed to read or
            write.
    """
    error = None
    try:
        yield
    except InputError as caught:
        error = caught
    except OSError as caught:
        error = InputError(f"{what}: {caught.strerror or caught}")
    if any_process(error is not None):
        raise error or InputError(f"{what}: failed on another process, which says why")


def any_process(flag: bool) -> bool:
    """Whether the flag is set on any process. All must ask together."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(process_allgather(np.array(flag))))


def most_of_processes(value: float) -> float:
    """The largest value of all processes. All must ask together."""
    if jax.process_count() == 1:
        return value
    return float(np.max(process_allgather(np.array(value, np.float32))))
