"""The device mesh, and which of its axes each logical axis of an array is split over."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental.multihost_utils import process_allgather, sync_global_devices
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from esft_jax.errors import InputError

DATA, EXPERT = "data", "expert"


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


def make_mesh(data: int = -1, expert: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with axes `data` and `expert`.

    Args:
        data: devices along `data`; -1 takes all that `expert` leaves.
        expert: devices that the experts of a layer are split over.
        devices: defaults to all devices of all processes.

    Raises:
        InputError: the shape does not fit the devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    if data == -1:
        if len(devices) % expert:
            raise InputError(f"mesh.expert: {expert} does not divide the {len(devices)} devices")
        data = len(devices) // expert
    if data * expert > len(devices):
        raise InputError(
            f"mesh: data {data} x expert {expert} needs {data * expert} devices; "
            f"{len(devices)} available"
        )
    if data * expert < len(devices) and jax.process_count() > 1:
        raise InputError(
            f"mesh: data {data} x expert {expert} leaves devices of some hosts unused; "
            f"expected {len(devices)} devices"
        )
    grid = np.asarray(devices[: data * expert]).reshape(data, expert)
    return Mesh(grid, (DATA, EXPERT))


@dataclass(frozen=True)
class ShardingRules:
    """Mesh axes of each logical axis.

    Attributes:
        batch: rows of the batch. All devices hold different rows; the devices of one expert group
            exchange tokens.
        experts: routed experts, and rows of the tuned bank.
        embed: the model-width side of every other matrix (fully sharded, gathered when used).
        vocab: the words of the head. An expert group shares them out, as it does experts; each
            part is fully sharded over `data`, like `embed`.
        layers: the stacking axis; never split.
    """

    batch: tuple[str, ...] = (DATA, EXPERT)
    experts: tuple[str, ...] = (EXPERT,)
    embed: tuple[str, ...] = (DATA, EXPERT)
    vocab: tuple[str, ...] = (EXPERT, DATA)
    layers: tuple[str, ...] = ()

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


def param_shardings(params: nnx.State, mesh: Mesh | None) -> Any:
    """Shardings of a state of parameters, by the axis names they were created with.

    Without a mesh: the default device.
    """

    def sharding(param: nnx.Variable) -> Any:
        if mesh is None:
            return jax.sharding.SingleDeviceSharding(jax.devices()[0])
        value = param.get_value()  # not `param[...]`: the parameter may be abstract
        return NamedSharding(mesh, RULES.spec(param.axes, value.shape, mesh))

    return jax.tree.map(
        lambda p: p.replace(sharding(p)), params, is_leaf=lambda p: isinstance(p, nnx.Variable)
    )


def on_first_process(action: Callable[[], object], name: str) -> None:
    """Run an action on process 0 while all others wait for it."""
    if jax.process_index() == 0:
        action()
    sync_global_devices(name)


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


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of `[B, ...]` arrays."""
    return NamedSharding(mesh, PartitionSpec(RULES.batch))


def device_multiple(rows: int, mesh: Mesh | None) -> int:
    """The next number of rows that all devices share evenly."""
    devices = 1 if mesh is None else mesh.size
    return math.ceil(rows / devices) * devices


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh | None) -> dict[str, jax.Array]:
    """This process's rows of a batch, on its devices."""
    if mesh is None:
        return {key: jax.numpy.asarray(value) for key, value in batch.items()}
    sharding = batch_sharding(mesh)
    return {
        key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()
    }


def constrain_batch(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Keep an activation `[B, ...]` split over the batch inside jit."""
    return x if mesh is None else jax.lax.with_sharding_constraint(x, batch_sharding(mesh))
