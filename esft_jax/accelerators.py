"""What the makers of accelerators say of their devices."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Peaks:
    """What the maker says of one device, as JAX counts devices.

    Attributes:
        flops: bfloat16 operations per second, dense.
        memory: bytes per second of its memory.
        network: bytes per second that it receives over all its links to others together.
    """

    flops: float
    memory: float
    network: float


# TPUs: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, of whose bidirectional interconnect
# bandwidth per chip one direction counts. That of v4 (6 links of 45 GB/s) is from
# jax-ml.github.io/scaling-book/tpus. A chip of tpu7x is two devices.
# H100 SXM: NVIDIA's data sheet, half of its operations with sparsity and of its NVLink bandwidth.
PEAKS = {
    "v4": Peaks(275e12, 1200e9, 270e9),
    "v5e": Peaks(197e12, 819e9, 200e9),
    "v5p": Peaks(459e12, 2765e9, 600e9),
    "v6e": Peaks(918e12, 1638e9, 400e9),
    "tpu7x": Peaks(2307e12 / 2, 7380e9 / 2, 600e9),
    "h100": Peaks(989e12, 3350e9, 450e9),
}


# What JAX calls them.
_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v6 lite": "v6e",
    "TPU7x": "tpu7x",
    "NVIDIA H100 80GB HBM3": "h100",
}


def peak_flops(device_kind: str) -> float | None:
    """Bfloat16 operations per second of a device, by `jax.Device.device_kind`; None if unknown."""
    kind = _KINDS.get(device_kind)
    return None if kind is None else PEAKS[kind].flops
