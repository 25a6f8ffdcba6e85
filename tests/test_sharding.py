"""How devices are arranged: slices along replicas, expert groups within one slice."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from esft_jax import processes
from esft_jax.errors import InputError
from esft_jax.sharding import count_slices, make_mesh
from esft_jax.topology import ahead_of_time_devices


def test_parts_of_a_cpu_keep_their_order() -> None:
    devices = jax.devices()
    assert count_slices(devices) == 1
    mesh = make_mesh(expert=2, replica=2)
    assert dict(mesh.shape) == {"replica": 2, "data": 2, "expert": 2}
    assert list(mesh.devices.flat) == devices
    assert dict(make_mesh(expert=4).shape) == {"replica": 1, "data": 2, "expert": 4}


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"expert": 3}, "mesh.expert: 3 does not divide the 8 devices"),
        ({"replica": 5}, "mesh.replica: 5 does not divide the 8 devices"),
        ({"expert": 4, "replica": 4}, "mesh.expert: 4 x 4 does not divide the 8 devices"),
        ({"data": 4, "expert": 4}, "mesh: data 4 x expert 4 needs 16 devices; 8 available"),
        (
            {"data": 2, "expert": 4, "replica": 2},
            "mesh: replica 2 x data 2 x expert 4 needs 16 devices; 8 available",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_named(shape: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_mesh(**shape)


def tpus(name: str) -> list[jax.Device]:
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu, the compiler for TPU")
    return ahead_of_time_devices(name)


@pytest.mark.parametrize(
    ("topology", "wanted", "shape"),
    [
        ("2xv5e:2x4", {"expert": 8}, (2, 1, 8)),
        ("2xv5e:2x4", {"expert": 4, "replica": 1}, (1, 4, 4)),
        ("2xv5e:2x4", {"expert": 4, "replica": 4}, (4, 1, 4)),
        ("4xv5e:2x2", {"expert": 2, "replica": 2}, (2, 4, 2)),
    ],
)
def test_an_expert_group_lies_within_a_slice(topology, wanted, shape) -> None:
    devices = tpus(topology)
    mesh = make_mesh(devices=devices, **wanted)
    assert mesh.devices.shape == shape
    assert {d.id for d in mesh.devices.flat} == {d.id for d in devices}
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    assert (slices == slices[..., :1]).all()
    # Slices are the outermost: no replica shares its slice's devices with part of another's.
    assert (np.diff(slices.reshape(-1)) >= 0).all()


def test_slices_that_cannot_be_shared_out_are_named() -> None:
    with pytest.raises(InputError, match=r"mesh.expert: 8 does not divide the 4 devices of a sl"):
        make_mesh(1, 8, tpus("2xv5e:2x2"), replica=1)
    with pytest.raises(InputError, match=r"mesh.replica: 2 replicas on 3 slices"):
        make_mesh(-1, 2, tpus("3xv5e:2x2"), replica=2)


def test_neighbours_of_one_slice_are_next_to_each_other() -> None:
    mesh = make_mesh(devices=tpus("v5e:4x4"), expert=4)
    for group in mesh.devices.reshape(-1, 4):
        coords = np.array([device.coords for device in group])
        assert np.ptp(coords, axis=0).sum() <= 3


@pytest.mark.parametrize(
    ("devices", "installed", "asked", "skipped"),
    [
        ([], True, None, True),
        (["vfio/vfio"], True, None, True),  # the driver's own file, without a chip
        (["accel0"], True, None, False),
        (["vfio/0"], True, None, False),
        (["nvidia0"], True, None, False),
        ([], False, None, False),
        ([], True, "tpu,cpu", False),
    ],
)
def test_no_tpu_is_looked_for_where_none_can_be(
    devices: list[str],
    installed: bool,
    asked: str | None,
    skipped: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for device in devices:
        (tmp_path / device).parent.mkdir(exist_ok=True)
        (tmp_path / device).touch()
    monkeypatch.setattr(processes, "_DEV", tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if installed else None)
    chosen: dict[str, str] = {}
    config = SimpleNamespace(values={"jax_platforms": asked}, update=chosen.__setitem__)
    monkeypatch.setattr(jax, "config", config)
    processes.skip_absent_tpu()
    assert chosen == ({"jax_platforms": "cpu"} if skipped else {})
