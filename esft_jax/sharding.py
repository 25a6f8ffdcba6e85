"""The device mesh, and which of its axes each logical axis of an array is split over."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from esft_jax.errors import InputError
from esft_jax.host_memory import PINNED, host_sharding

REPLICA, DATA, EXPERT = "replica", "data", "expert"

Arrays = TypeVar("Arrays")  # a tree of arrays `[B, ...]`, such as a `Batch`


def make_mesh(
    data: int = -1,
    expert: int = 1,
    devices: Sequence[Any] | None = None,
    replica: int | None = None,
) -> Mesh:
    """A mesh with axes `replica`, `data` and `expert`.

    Slices lie along `replica`, or within a replica along `data`: an expert group never spans two of
    them.

    Args:
        data: devices along `data`; -1 takes all that the others leave.
        expert: devices that the experts of a layer are split over.
        devices: defaults to all devices of all processes.
        replica: copies of all weights; None takes one for each slice.

    Raises:
        InputError: the shape does not fit the devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    slices = count_slices(devices)
    replica = slices if replica is None else replica
    if data == -1:
        if len(devices) % (replica * expert):
            if len(devices) % replica:
                raise InputError(
                    f"mesh.replica: {replica} does not divide the {len(devices)} devices"
                )
            times = f"{replica} x {expert}" if replica > 1 else str(expert)
            raise InputError(f"mesh.expert: {times} does not divide the {len(devices)} devices")
        data = len(devices) // (replica * expert)
    shape = (replica, data, expert)
    size = math.prod(shape)
    named = f"data {data} x expert {expert}"
    if replica > 1:
        named = f"replica {replica} x {named}"
    if size > len(devices):
        raise InputError(f"mesh: {named} needs {size} devices; {len(devices)} available")
    if size < len(devices) and (jax.process_count() > 1 or slices > 1):
        raise InputError(
            f"mesh: {named} leaves devices of some hosts unused; expected {len(devices)} devices"
        )
    if size < len(devices) or devices[0].platform == "cpu":
        grid = np.asarray(devices[:size]).reshape(shape)
    else:
        grid = _arrange(devices, slices, shape)
    return Mesh(grid, (REPLICA, DATA, EXPERT))


def count_slices(devices: Sequence[Any]) -> int:
    """How many groups the devices form that a slower network connects: TPU slices, GPU hosts."""
    if devices[0].platform == "cpu":
        return 1
    return len({getattr(device, "slice_index", 0) for device in devices})


def _arrange(devices: list[Any], slices: int, shape: tuple[int, int, int]) -> np.ndarray:
    """All devices of accelerators, neighbours in the network next to each other."""
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    replica, _, expert = shape
    per_slice = len(devices) // slices
    if per_slice % expert:
        raise InputError(
            f"mesh.expert: {expert} does not divide the {per_slice} devices of a slice; an expert "
            "group must lie within one"
        )
    if replica % slices == 0:
        across = (slices, 1, 1)
    elif slices % replica == 0:
        across = (replica, slices // replica, 1)
    else:
        raise InputError(
            f"mesh.replica: {replica} replicas on {slices} slices; expected one number to divide "
            "the other"
        )
    within = tuple(size // parts for size, parts in zip(shape, across, strict=True))
    return mesh_utils.create_hybrid_device_mesh(
        within, across, devices, allow_split_physical_axes=True
    )


@dataclass(frozen=True)
class ShardingRules:
    """Mesh axes of each logical axis.

    Attributes:
        batch: rows of the batch. All devices hold different rows; the devices of one expert group
            exchange tokens.
        experts: routed experts, and rows of the tuned bank.
        embed: the model-width side of every other matrix (fully sharded over a replica, gathered
            when used).
        vocab: the words of the head. They are split over an expert group, as experts are; each
            part is fully sharded over `data`, like `embed`.
        layers: the stacking axis; never split.
        taps: of a convolution; never split.
    """

    batch: tuple[str, ...] = (REPLICA, DATA, EXPERT)
    experts: tuple[str, ...] = (EXPERT,)
    embed: tuple[str, ...] = (DATA, EXPERT)
    vocab: tuple[str, ...] = (EXPERT, DATA)
    layers: tuple[str, ...] = ()
    taps: tuple[str, ...] = ()

    def spec(self, axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
        """Partition of an array with these logical axes.

        An `embed` or `vocab` axis that the mesh does not divide stays whole; that costs memory, not
        correctness.

        Raises:
            InputError: two axes of the array land on one mesh axis, or experts do not divide.
        """
        known = {field.name for field in fields(self)}
        used: dict[str, str] = {}
        entries: list[tuple[str, ...] | None] = []
        for name, size in zip(axes, shape, strict=True):
            if name is None:
                entries.append(None)
                continue
            if name not in known:
                raise InputError(f"logical axis {name!r} has no sharding rule")
            mesh_axes: tuple[str, ...] = getattr(self, name)
            for mesh_axis in mesh_axes:
                if mesh_axis in used:
                    raise InputError(
                        f"logical axes {used[mesh_axis]!r} and {name!r} both map to mesh axis "
                        f"{mesh_axis!r}"
                    )
                used[mesh_axis] = name
            ways = int(np.prod([mesh.shape[axis] for axis in mesh_axes], dtype=int))
            if size % ways:
                if name not in ("embed", "vocab"):
                    raise InputError(
                        f"{name}: {size} cannot be split over {ways} devices (mesh axes "
                        f"{', '.join(mesh_axes)})"
                    )
                entries.append(None)
                continue
            entries.append(mesh_axes or None)
        return PartitionSpec(*entries)


RULES = ShardingRules()


def param_shardings(
    params: nnx.State,
    mesh: Mesh | None,
    on_host: Callable[[nnx.Variable], bool] = lambda param: False,
) -> Any:
    """Shardings of a state of parameters, by the axis names they were created with.

    Args:
        mesh: None stands for the default device.
        on_host: which parameters are in the memory of the host.
    """

    def place(param: nnx.Variable, leaf: Any) -> Any:
        found: Any
        if mesh is None:
            found = SingleDeviceSharding(jax.devices()[0])
        else:
            found = NamedSharding(mesh, RULES.spec(param.axes, leaf.shape, mesh))
        return _in_host_memory(found) if on_host(param) else found

    def sharding(param: nnx.Variable) -> Any:
        value = param.get_value()  # not `param[...]`: the parameter may be abstract
        # Codes and scales of quantised weights have the same axes.
        return jax.tree.map(lambda leaf: place(param, leaf), value)

    return jax.tree.map(
        lambda p: p.replace(sharding(p)), params, is_leaf=lambda p: isinstance(p, nnx.Variable)
    )


class _DescribedSharding(NamedSharding):
    """In the memory of the host of devices that are only described: JAX finds no memories of GPUs
    in a description, and would leave out which one is meant.
    """

    @property
    def memory_kind(self) -> str:
        return PINNED

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and super().__eq__(other)

    def __hash__(self) -> int:
        return hash((PINNED, super().__hash__()))


def _in_host_memory(place: NamedSharding | SingleDeviceSharding) -> NamedSharding:
    if isinstance(place, SingleDeviceSharding):
        return host_sharding(*place.device_set)
    found = place.with_memory_kind(PINNED)
    return found if found.memory_kind == PINNED else _DescribedSharding(place.mesh, place.spec)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of `[B, ...]` arrays."""
    return NamedSharding(mesh, PartitionSpec(RULES.batch))


def device_multiple(rows: int, mesh: Mesh | None) -> int:
    """The next number of rows that all devices share evenly."""
    devices = 1 if mesh is None else mesh.size
    return math.ceil(rows / devices) * devices


def place_batch(batch: Arrays, mesh: Mesh | None) -> Arrays:
    """This process's rows of a batch, on its devices; see `place_whole_batch`."""
    if mesh is None:
        return jax.tree.map(jax.numpy.asarray, batch)
    place = partial(jax.make_array_from_process_local_data, batch_sharding(mesh))
    return jax.tree.map(place, batch)


def place_whole_batch(batch: dict[str, np.ndarray], mesh: Mesh | None) -> dict[str, jax.Array]:
    """A batch that every process holds whole, on all devices; row i of the result is row i of it.

    Of `place_batch` only the set of rows is known: on a TPU slice, the devices of one process need
    not lie next to each other in the mesh.
    """
    if mesh is None:
        return {key: jax.numpy.asarray(value) for key, value in batch.items()}
    sharding = batch_sharding(mesh)
    return {
        key: jax.make_array_from_callback(value.shape, sharding, value.__getitem__)
        for key, value in batch.items()
    }


def constrain_batch(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Keep an activation `[B, ...]` split over the batch inside jit."""
    return x if mesh is None else jax.lax.with_sharding_constraint(x, batch_sharding(mesh))
