"""How much of a GPU's memory JAX takes, which is all that a program may have of it."""

import math
import os

from esft_jax.accelerators import Gpu
from esft_jax.errors import InputError

FRACTION = "XLA_CLIENT_MEM_FRACTION"
_OLD_FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"
_DEFAULT = 0.75  # docs.jax.dev, "GPU memory allocation"
# For the driver, the code of kernels, CUDA graphs and NCCL. The driver's context alone is half of
# it.
_RESERVED = 2**30


def memory_fraction() -> float:
    """The share of a GPU's memory that JAX takes, as the environment has it.

    Raises:
        InputError: naming the variable that JAX would not understand.
    """
    given = {name: os.environ[name] for name in (FRACTION, _OLD_FRACTION) if os.environ.get(name)}
    if len(given) > 1:
        raise InputError(f"{FRACTION}: {_OLD_FRACTION} is set, too; expected one of them")
    for name, text in given.items():
        try:
            fraction = float(text)
        except ValueError:
            fraction = math.nan
        if not 0 < fraction <= 1:
            raise InputError(f"{name}: {text!r}; expected a number above 0, at most 1")
        return fraction
    return _DEFAULT


def granted(gpu: Gpu, fraction: float) -> int:
    """Bytes that a program may take if JAX takes this share."""
    return min(int(fraction * gpu.memory), gpu.memory - _RESERVED)


def fraction_for(gpu: Gpu, needed: int) -> float | None:
    """The least share, in hundredths, that grants so many bytes; None if there are not so many."""
    fraction = math.ceil(100 * needed / gpu.memory) / 100
    return fraction if needed <= granted(gpu, fraction) else None
