"""The tuned bank: the selected experts as parameters of their own.

Optimizers label whole leaves, and all experts of a layer share one leaf. Training a few of them
inside that leaf would still allocate gradients and moments for all (`docs/design.md`). So the
selected experts are copied into one flat bank, one row per selected (layer, expert), which is all
that a run differentiates, keeps moments for, and saves.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from jaxtyping import Array, Float, Int, Shaped

from esft_jax.adapt.slots import TunedLayout
from esft_jax.host_memory import is_on_host, to_device
from esft_jax.model.params import Role
from esft_jax.moe.weights import ExpertWeights
from esft_jax.ops.quantised import Quantised
from esft_jax.sharding import EXPERT, RULES

# `gate_up` or `down` of a base expert in float32: of an index among the MoE layers, and an id.
ReadExpert = Callable[[str, int, int], Float[np.ndarray, "in out"]]


class TunedParam(nnx.Param):
    """A bank of tuned experts."""


def in_bank(param: nnx.Variable) -> bool:
    """Whether a parameter is a bank beside the base experts: of tuned experts, or of factors."""
    beside = isinstance(param, TunedParam | nnx.LoRAParam)
    return beside and param.role is Role.ROUTED_EXPERT


class TunedExperts(nnx.Module):
    """The selected experts of all layers: `gate_up [R, D, 2F]`, `down [R, F, D]`, and `gate_up_bias
    [R, 2F]`, `down_bias [R, D]` of those that have biases.
    """

    default_id = None

    def __init__(self, banks: ExpertWeights, layout: TunedLayout):
        for name, bank in banks._asdict().items():
            if bank is not None:
                axes = ("experts", *[None] * (bank.ndim - 1))
                setattr(self, name, TunedParam(bank, axes=axes, role=Role.ROUTED_EXPERT))
        self.layout = layout

    @property
    def banks(self) -> ExpertWeights:
        """All of them, as `TunedLayout.layer_window` takes them."""
        return ExpertWeights.held_by(self).map(lambda param: param[...])

    @classmethod
    def from_base(
        cls,
        base: ExpertWeights,
        layout: TunedLayout,
        mesh: Mesh | None = None,
        read_expert: ReadExpert | None = None,
    ) -> "TunedExperts":
        """Float32 copies of the selected base experts, on the devices that own them.

        Padding rows are zero.

        Args:
            base: those of all layers, `[L, E, ...]`, placed as the layout says.
            read_expert: where matrices are read that `base` holds quantised: what is trained never
                begins with a rounded weight.

        Raises:
            ValueError: they are quantised, and there is no `read_expert`.
        """
        # Source of each row: layer, place in its stack, and whether there is one.
        sources = np.zeros((layout.shards * layout.rows_per_shard, 3), np.int32)
        for layer, expert, row in layout.rows():
            sources[row] = layer, layout.placement.positions[layer][expert], 1
        source = jnp.asarray(sources)

        def read(bank: Array, source: Array, shard: Array | int) -> Array:
            layers, experts, filled = source.T
            experts = experts - shard * bank.shape[1]
            here = (filled > 0) & (experts >= 0) & (experts < bank.shape[1])
            rows = _look_up(bank, layers, jnp.where(here, experts, 0))
            return jnp.where(here.reshape(-1, *[1] * (rows.ndim - 1)), rows, 0)

        def deal_out(bank: Array, source: Array) -> Array:
            # One row for each device at a time: all together would take as much memory on each of
            # them as the whole bank.
            def next_row(_: None, wanted: Array) -> tuple[None, Array]:
                rows = read(bank, wanted, jax.lax.axis_index(EXPERT))
                own = jax.lax.psum_scatter(rows, EXPERT, tiled=True)
                return None, own[0].astype(jnp.float32)

            by_turn = source.reshape(layout.shards, -1, 3).swapaxes(0, 1)
            return jax.lax.scan(next_row, None, by_turn)[1]

        if layout.shards == 1:
            copy = jax.jit(lambda bank: read(bank, source, 0).astype(jnp.float32))
        else:
            assert mesh is not None
            copy = jax.jit(
                jax.shard_map(
                    lambda bank: deal_out(bank, source),
                    mesh=mesh,
                    in_specs=PartitionSpec(None, RULES.experts),
                    out_specs=PartitionSpec(RULES.experts),
                    check_vma=False,
                )
            )

        def bank(name: str, stack: Array | Quantised | None) -> Array | None:
            if not isinstance(stack, Quantised):
                return None if stack is None else copy(stack)
            if read_expert is None:
                raise ValueError(f"{name}: is quantised; expected a way to read full precision")
            return _read_bank(partial(read_expert, name), layout, stack.shape[2:], mesh)

        found = {name: bank(name, stack) for name, stack in base._asdict().items()}
        return cls(ExpertWeights(**found), layout)


def _look_up(
    bank: Shaped[Array, "L E *_"], layers: Int[Array, " N"], experts: Int[Array, " N"]
) -> Shaped[Array, "N *_"]:
    """Experts of a stack, on the device."""
    if not is_on_host(bank):
        return bank[layers, experts]

    def row(place: tuple[Array, Array]) -> Array:
        begin: Any = (*place, *[0] * (bank.ndim - 2))
        return to_device(jax.lax.dynamic_slice(bank, begin, (1, 1, *bank.shape[2:])))[0, 0]

    return jax.lax.map(row, (layers, experts))


def _read_bank(
    read: Callable[[int, int], Float[np.ndarray, "in out"]],
    layout: TunedLayout,
    shape: tuple[int, ...],
    mesh: Mesh | None,
) -> Float[Array, "R in out"]:
    """A tuned bank of matrices that each device's process reads; padding rows are zero."""
    rows = layout.by_row()
    place: NamedSharding | SingleDeviceSharding = SingleDeviceSharding(jax.devices()[0])
    if mesh is not None:
        place = NamedSharding(mesh, PartitionSpec(RULES.experts))

    def part(index: Any) -> np.ndarray:
        own = rows[index[0]]
        values = np.zeros((len(own), *shape), np.float32)
        for value, expert in zip(values, own, strict=True):
            if expert is not None:
                value[...] = read(*expert)
        return values

    return jax.make_array_from_callback((len(rows), *shape), place, part)
