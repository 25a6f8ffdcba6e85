"""How much memory there is, and one line for what does not fit."""

import contextlib
import os
from pathlib import Path

import jax

from esft_jax.errors import InputError, RunFailed, one_line

_HINT = (
    "expected less, by a smaller batch_size of train, score or evaluation, shorter rows, more "
    "train.micro_batches, another train.remat, or more devices (`plan` says what a training step "
    "needs)"
)
_CGROUP = Path("/sys/fs/cgroup/memory.max")


def out_of_memory(error: Exception) -> RunFailed | None:
    """The line for an error that says that memory is used up; None for another error."""
    text = str(error)
    # XLA's errors have one type, and say by a word what they are.
    jax_error = type(error).__name__ == "JaxRuntimeError"
    if isinstance(error, MemoryError) or (
        jax_error and ("RESOURCE_EXHAUSTED" in text or "bad_alloc" in text)
    ):
        return RunFailed(f"out of memory: {one_line(error) or 'of the host'}; {_HINT}")
    return None


def local_memory() -> int | None:
    """Bytes that a program may take on each device of this process; None where it is unknown.

    Devices that are parts of one CPU share its memory.
    """
    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        return _host_memory() // len(devices)
    return (devices[0].memory_stats() or {}).get("bytes_limit")


def _host_memory() -> int:
    """Of the machine, or of the container that this process is in."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # no such file, or `max`
        total = min(total, int(_CGROUP.read_text()))
    return total


def check_fits(needed: int, what: str) -> None:
    """Refuse what the memory of a device cannot hold.

    Args:
        needed: bytes per device.
        what: what needs them, with the key that decides on it.

    Raises:
        InputError: with both sizes.
    """
    available = local_memory()
    if available is not None and needed > available:
        raise InputError(
            f"{what}: {needed / 1e9:,.1f} GB per device, of {available / 1e9:,.1f} GB; {_HINT}"
        )
