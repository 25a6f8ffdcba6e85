"""What the makers of accelerators say of their devices."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Peaks:
    """What the maker says of one device, as JAX counts devices.

    Attributes:
        flops: bfloat16 operations per second, dense, with sums in float32.
        memory: bytes per second of its memory.
        network: bytes per second that it receives over all its links to others together.
        host: bytes per second that it receives from its host; None where nobody says.
    """

    flops: float
    memory: float
    network: float
    host: float | None


@dataclass(frozen=True)
class Architecture:
    """What NVIDIA's GPUs of one compute capability have in common.

    Attributes:
        capability: the compute capability.
        lanes: float32 units of a multiprocessor.
        threads: that a multiprocessor holds.
        shared_memory: bytes of it.
    """

    capability: str
    lanes: int
    threads: int
    shared_memory: int

    @property
    def block_shared_memory(self) -> int:
        """Bytes of shared memory that a block may take: the system keeps 1 KiB for itself."""
        return self.shared_memory - 2**10


@dataclass(frozen=True)
class Gpu:
    """A GPU of NVIDIA's.

    Attributes:
        kinds: what JAX calls it (`jax.Device.device_kind`); the first one is what is compiled for.
        cores: multiprocessors.
        clock: highest clock rate, GHz.
        l2: bytes of the second cache.
        memory: bytes that CUDA reports, which are fewer than those of its name.
    """

    kinds: tuple[str, ...]
    architecture: Architecture
    cores: int
    clock: float
    l2: int
    memory: int
    peaks: Peaks


# CUDA C++ programming guide, "Technical specifications per compute capability".
_AMPERE = Architecture("8.0", lanes=64, threads=2048, shared_memory=164 * 2**10)
_ADA = Architecture("8.9", lanes=128, threads=1536, shared_memory=100 * 2**10)
_HOPPER = Architecture("9.0", lanes=128, threads=2048, shared_memory=228 * 2**10)
_BLACKWELL = Architecture("10.0", lanes=128, threads=2048, shared_memory=228 * 2**10)
_BLACKWELL_RTX = Architecture("12.0", lanes=128, threads=1536, shared_memory=100 * 2**10)

# PCI Express, 16 lanes, one direction: of the fourth and of the fifth generation. The data sheets
# say which one connects a GPU to its host.
_PCIE4, _PCIE5 = 32e9, 64e9

# Peaks are from NVIDIA's data sheets (A100, H100, H200, L40S, HGX B200), half of the operations
# with sparsity and of the bandwidth of NVLink, which is said of both directions; those of GeForce
# cards from its papers on the architectures Ada (version 2.1, appendix A) and RTX Blackwell
# (appendix A), where sums in float32 have half the rate of sums in float16. What the compiler asks
# for, multiprocessors, clocks, caches and memory, is as XLA has it (openxla/xla,
# xla/backends/gpu/target_config/specs) but for the GeForce cards, the L40S (both papers) and the
# memory of these and of the H200, which is as PyTorch's messages have it from CUDA (23.64, 31.36,
# 44.39 and 139.80 GiB).
GPUS = {
    "rtx4090": Gpu(
        ("NVIDIA GeForce RTX 4090",),
        _ADA,
        cores=128,
        clock=2.52,
        l2=72 * 2**20,
        memory=24207 * 2**20,
        peaks=Peaks(165.2e12, 1008e9, _PCIE4, _PCIE4),
    ),
    "rtx5090": Gpu(
        ("NVIDIA GeForce RTX 5090",),
        _BLACKWELL_RTX,
        cores=170,
        clock=2.407,
        l2=96 * 2**20,
        memory=32112 * 2**20,
        peaks=Peaks(209.5e12, 1792e9, _PCIE5, _PCIE5),
    ),
    "l40s": Gpu(
        ("NVIDIA L40S",),
        _ADA,
        cores=142,
        clock=2.52,
        l2=96 * 2**20,
        memory=45455 * 2**20,
        peaks=Peaks(362.05e12, 864e9, _PCIE4, _PCIE4),
    ),
    "a100-40": Gpu(
        ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"),
        _AMPERE,
        cores=108,
        clock=1.41,
        l2=40 * 2**20,
        memory=42298834944,
        peaks=Peaks(312e12, 1555e9, 300e9, _PCIE4),
    ),
    "a100-80": Gpu(
        ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe"),
        _AMPERE,
        cores=108,
        clock=1.41,
        l2=40 * 2**20,
        memory=85100068864,
        peaks=Peaks(312e12, 2039e9, 300e9, _PCIE4),
    ),
    "h100": Gpu(
        ("NVIDIA H100 80GB HBM3",),
        _HOPPER,
        cores=132,
        clock=1.98,
        l2=50 * 2**20,
        memory=84942979072,
        peaks=Peaks(989e12, 3350e9, 450e9, _PCIE5),
    ),
    "h200": Gpu(
        ("NVIDIA H200",),
        _HOPPER,
        cores=132,
        clock=1.98,
        l2=50 * 2**20,
        memory=143155 * 2**20,
        peaks=Peaks(989e12, 4800e9, 450e9, _PCIE5),
    ),
    "b200": Gpu(
        ("NVIDIA B200",),
        _BLACKWELL,
        cores=148,
        clock=1.965,
        l2=132644864,
        memory=191514411008,
        peaks=Peaks(2250e12, 8000e9, 900e9, _PCIE5),
    ),
}


# TPUs: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, of whose bidirectional interconnect
# bandwidth per chip one direction counts. That of v4 (6 links of 45 GB/s) is from
# jax-ml.github.io/scaling-book/tpus, and so is the bandwidth between a host and v6e, about 15 GB/s;
# that of the others is not known here. A chip of tpu7x is two devices.
PEAKS = {
    "v4": Peaks(275e12, 1200e9, 270e9, None),
    "v5e": Peaks(197e12, 819e9, 200e9, None),
    "v5p": Peaks(459e12, 2765e9, 600e9, None),
    "v6e": Peaks(918e12, 1638e9, 400e9, 15e9),
    "tpu7x": Peaks(2307e12 / 2, 7380e9 / 2, 600e9, None),
} | {name: gpu.peaks for name, gpu in GPUS.items()}


# What JAX calls them.
_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v6 lite": "v6e",
    "TPU7x": "tpu7x",
} | {kind: name for name, gpu in GPUS.items() for kind in gpu.kinds}


def peaks_of(device_kind: str) -> Peaks | None:
    """The peaks of a device, by `jax.Device.device_kind`; None if they are unknown."""
    return PEAKS.get(_KINDS.get(device_kind, ""))


def peak_flops(device_kind: str) -> float | None:
    """Bfloat16 operations per second of a device, by `jax.Device.device_kind`; None if unknown."""
    peaks = peaks_of(device_kind)
    return None if peaks is None else peaks.flops


def gpu_of(device_kind: str) -> Gpu | None:
    """The GPU that JAX calls so; None if it is unknown here."""
    return GPUS.get(_KINDS.get(device_kind, ""))
