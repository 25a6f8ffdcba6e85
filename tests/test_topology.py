"""Names of topologies; what they compile is tested with what is compiled."""

import importlib.util

import jax
import pytest

from esft_jax.accelerators import GPUS, PEAKS, gpu_of, peak_flops
from esft_jax.errors import InputError
from esft_jax.topology import ahead_of_time_devices


@pytest.mark.parametrize(
    "name",
    [
        "v5e",
        "v5e:2x2x1",
        "v5e:0x4",
        "v5p:2x2",
        "v7:2x2",
        "h100:2x4",
        "2xh100:8",
        "rtx4080:1",
        "a100:1",
        "a100-40",
        "cpu:",
        "cpu:8 ",
        "cpu:" + "9" * 5000,
    ],
)
def test_what_is_no_topology_never_reaches_a_compiler(name: str) -> None:
    with pytest.raises(InputError, match="expected a TPU slice such as v5e:2x4.*rtx4090.*b200"):
        ahead_of_time_devices(name)


@pytest.mark.parametrize("name", ["cpu:100000", "h100:1025", "a100-80:1025"])
def test_more_devices_than_jax_can_make(name: str) -> None:
    with pytest.raises(InputError, match="expected at most .*:1024"):
        ahead_of_time_devices(name)


def test_parts_of_this_cpu() -> None:
    assert len(jax.devices()) == 8  # from here on, JAX does not split it in another way
    assert len(ahead_of_time_devices("cpu:3")) == 3
    with pytest.raises(InputError, match="cpu:9; JAX has split this CPU into 8"):
        ahead_of_time_devices("cpu:9")


@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_the_peak_of_a_chip_is_found_by_its_name_in_jax(name: str) -> None:
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu, the compiler for TPU")
    kind = ahead_of_time_devices(name)[0].device_kind
    assert peak_flops(kind) == PEAKS[name.partition(":")[0]].flops
    assert peak_flops("cpu") is None


@pytest.mark.parametrize("name", GPUS)
def test_a_gpu_is_found_by_its_name_in_jax(name: str) -> None:
    for kind in GPUS[name].kinds:
        assert gpu_of(kind) is GPUS[name]
        assert peak_flops(kind) == PEAKS[name].flops


def test_nothing_is_said_of_other_devices() -> None:
    assert gpu_of("NVIDIA GeForce RTX 3090") is gpu_of("TPU v4") is gpu_of("cpu") is None
